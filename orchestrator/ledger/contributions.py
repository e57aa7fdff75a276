"""Plans and contributions in the ledger: what was asked, what came, what counts, exactly once."""

from __future__ import annotations

from orchestrator.ledger.database import Database
from orchestrator.ledger.rows import Acceptance, Answer, ContributionRow, PlanKind, PlanRow


class Contributions(Database):
    """The part of the ledger that says which work counts."""

    def plan(self, plan_id: str, site: str) -> PlanRow | None:
        """A site's plan; None if there is none of that id for it."""
        raise NotImplementedError

    def plans(self, run: str, round: int, attempt: int) -> list[PlanRow]:
        """All plans of an attempt with their answers, by kind and site."""
        raise NotImplementedError

    def open_plans(self, site: str) -> list[PlanRow]:
        """What a site still has to do: plans of open exchanges without an answer, oldest first."""
        raise NotImplementedError

    def answer_plan(
        self, plan_id: str, site: str, answer: Answer, error: str = "", message: str = ""
    ) -> PlanRow:
        """Record how a plan ended other than with a contribution. The first answer stays.

        Gives the row afterwards, so that the caller sees which answer stands.

        Raises:
            NotFound: There is no such plan.
            InvalidInput: ``counted``, which only `accept` may say.
        """
        raise NotImplementedError

    def accept(self, row: ContributionRow) -> Acceptance:
        """Count a contribution whose bytes are in the store, or say that it is too late.

        In one transaction: counted if its exchange is open; also if it is not, but another plan
        of the same run, round, kind and site asks for the same work and is open. Otherwise late,
        recorded without header and signature. Whoever asks again hears the same. A second
        contribution to a plan that has one is refused.

        Raises:
            NotFound: The site has no such plan.
        """
        raise NotImplementedError

    def carry_over(self, run: str, round: int, attempt: int) -> list[ContributionRow]:
        """Count finished work of abandoned attempts for the plans that ask for it again.

        Gives the contributions that count now and did not before, by site.
        """
        raise NotImplementedError

    def contributions(
        self, run: str, round: int, attempt: int, kind: PlanKind | None = None
    ) -> list[ContributionRow]:
        """The contributions that count for an attempt, by site; carried ones included."""
        raise NotImplementedError

    def contribution(self, digest: str) -> ContributionRow:
        """One contribution, counted or late.

        Raises:
            NotFound: There is none of that digest.
        """
        raise NotImplementedError

    def last_counted(self, run: str, site: str, before: int | None = None) -> str:
        """Digest of the newest ``train`` contribution of a site in a run's history.

        The history is the closed sets of the committed rounds, then those of the run that it was
        started from, up to that round, and so on.

        Args:
            run: Id of the run.
            site: The site.
            before: Only rounds before this one; None for all.

        Returns:
            The digest; empty if nothing of that site is in the history.
        """
        raise NotImplementedError
