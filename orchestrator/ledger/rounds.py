"""Rounds in the ledger: planned → closed → [held] → committed | abandoned, and their exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.ledger.database import Database
from orchestrator.ledger.rows import PlanKind, PlanRow, RoundRow


class Rounds(Database):
    """The part of the ledger that knows rounds, their attempts and their exchanges.

    An exchange is (run, round, attempt, kind). Planning opens the one of the plans (train or
    init); closing, holding, committing and abandoning close whatever is open.
    """

    def plan_round(
        self, row: RoundRow, plans: Sequence[PlanRow] = (), *, abandoning: str = ""
    ) -> None:
        """Record an attempt of a round with its plans, before any of them goes out.

        Args:
            row: The attempt, in the state ``planned``.
            plans: Its plans; their exchange is open afterwards.
            abandoning: If given, the round's earlier attempt that is still planned, closed or
                held is abandoned with this reason in the same transaction. An answer then never
                falls between two attempts, where it would be late.

        Raises:
            Conflict: This attempt is there, another attempt of the round is not abandoned, or
                this round or a later one is committed.
            NotFound: There is no such run.
        """
        raise NotImplementedError

    def add_plans(self, plans: Sequence[PlanRow]) -> None:
        """Add plans to an exchange that is open (a site that joins late).

        Raises:
            Conflict: The exchange is not open, or a site has another plan in it.
        """
        raise NotImplementedError

    def open_exchange(
        self, run: str, round: int, attempt: int, kind: PlanKind, plans: Sequence[PlanRow] = ()
    ) -> None:
        """Open the exchange of a closed round in which its candidate is assessed.

        It may have been opened before, by a daemon that was stopped then: plans that ask for the
        same work keep their answers, plans that ask for other work replace the old ones.

        Raises:
            Conflict: The round attempt is not closed.
        """
        raise NotImplementedError

    def close_exchange(self, run: str, round: int, attempt: int, kind: PlanKind) -> None:
        """Close an exchange: answers to its plans are late from now on. Twice is as once."""
        raise NotImplementedError

    def exchange_open(self, run: str, round: int, attempt: int, kind: PlanKind) -> bool:
        """Whether contributions to this exchange still count."""
        raise NotImplementedError

    def extend_deadline(self, run: str, round: int, attempt: int, by_s: float) -> RoundRow:
        """Put a planned round's deadline off: time with the daemon down does not count.

        Raises:
            Conflict: The attempt is not planned.
        """
        raise NotImplementedError

    def close_round(
        self,
        run: str,
        round: int,
        attempt: int,
        closed_set: Sequence[str] | None,
        reason: str,
    ) -> RoundRow:
        """Close a planned round: from here on nothing more counts. Gives the row afterwards.

        Args:
            run: Id of the run.
            round: Of the round.
            attempt: Of the attempt.
            closed_set: Digests of counted contributions to close in; None for all that count at
                this instant (nothing that was answered ``counted`` is then left out by a race).
            reason: Why now.

        Raises:
            Conflict: It is not planned, or something in ``closed_set`` does not count for it.
        """
        raise NotImplementedError

    def hold_round(
        self,
        run: str,
        round: int,
        attempt: int,
        reason: str,
        *,
        model: str = "",
        outer_state: str = "",
        memos: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
    ) -> RoundRow:
        """Hold a closed round until somebody releases or rejects it; keeps the candidate.

        Raises:
            Conflict: It is not closed.
        """
        raise NotImplementedError

    def abandon_round(self, run: str, round: int, attempt: int, reason: str) -> RoundRow:
        """Give an attempt up, planned, closed or held.

        Raises:
            Conflict: It is committed, or abandoned.
        """
        raise NotImplementedError

    def commit_round(
        self,
        run: str,
        round: int,
        attempt: int,
        *,
        model: str,
        outer_state: str = "",
        memos: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
    ) -> RoundRow:
        """Commit a closed or held round, and make its model the run's. Gives the row afterwards.

        Raises:
            Conflict: It is neither closed nor held.
        """
        raise NotImplementedError

    def rounds(self, run: str, all_attempts: bool = False) -> list[RoundRow]:
        """The rounds of a run in order: of each the last attempt, or all of them."""
        raise NotImplementedError

    def round(self, run: str, number: int, attempt: int | None = None) -> RoundRow:
        """One round: an attempt, or the last one.

        Raises:
            NotFound: There is no such run, round or attempt.
        """
        raise NotImplementedError

    def history(self, run: str) -> list[RoundRow]:
        """The committed rounds of a run in order."""
        raise NotImplementedError

    def last_committed(self, run: str) -> RoundRow | None:
        """The newest committed round."""
        raise NotImplementedError

    def open_rounds(self) -> list[RoundRow]:
        """Attempts of all runs that are planned, closed or held: what a start goes on with."""
        raise NotImplementedError
