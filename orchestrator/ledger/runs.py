"""Runs in the ledger: the queue, and the hash chain of what happened to each of them."""

from __future__ import annotations

from collections.abc import Collection

from orchestrator.ledger.database import Database
from orchestrator.ledger.rows import Entry, RunRow
from orchestrator.views import RunState


class Runs(Database):
    """The part of the ledger that knows the runs."""

    def create_run(self, row: RunRow) -> None:
        """Record a new run.

        Raises:
            Conflict: There is a run of that name or id.
            NotFound: The run that it is started from is not there.
        """
        raise NotImplementedError

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        raise NotImplementedError

    def run(self, name_or_id: str) -> RunRow:
        """One run, by its id or its name.

        Raises:
            NotFound: There is no such run; the message names near matches.
        """
        raise NotImplementedError

    def set_run(
        self,
        run: str,
        *,
        state: RunState | None = None,
        reason: str | None = None,
        started: float | None = None,
        ended: float | None = None,
        model: str | None = None,
        expect: Collection[RunState] = (),
    ) -> RunRow:
        """Change a run; None leaves a field as it is. Gives the row afterwards.

        The state ``queued`` or ``running`` forgets ``ended`` (a run that goes on).

        Args:
            run: Its id.
            state: The new state.
            reason: Why.
            started: When its first round began.
            ended: When it ended.
            model: Digest of the index of its first base, before any round is committed.
            expect: States in which alone this may be done; empty for any.

        Raises:
            NotFound: There is no such run.
            Conflict: It is in none of the expected states, or ``model`` comes too late.
        """
        raise NotImplementedError

    def extend_run(self, run: str, rounds: int) -> RunRow:
        """Give a run more rounds: ``rounds`` in all. Gives the row afterwards.

        Raises:
            NotFound: There is no such run.
            Conflict: It has as many already.
        """
        raise NotImplementedError

    def next_queued(self) -> RunRow | None:
        """The oldest run that is queued."""
        raise NotImplementedError

    def running(self) -> RunRow | None:
        """The run that is running: after a start, the one to go on with."""
        raise NotImplementedError

    def entries(self, run: str) -> list[Entry]:
        """The hash chain of a run, oldest first."""
        raise NotImplementedError

    def verify_entries(self, run: str) -> str:
        """Check a run's hash chain; gives the digest of its newest entry.

        Raises:
            NotFound: There is no such run.
            DataCorrupt: An entry was changed, removed or put in; names it.
        """
        raise NotImplementedError
