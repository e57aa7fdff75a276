"""What came of a contribution: written into the ledger, and told to the round under way."""

from __future__ import annotations

from typing import Protocol

from orchestrator.ledger import Acceptance, ContributionRow, Ledger
from protos.faults import reach


class Hearing(Protocol):
    """Who wants to know what comes of contributions: the round under way."""

    def counted(self, site: str, plan_id: str, header_digest: str) -> None:
        """A contribution is durable and counts."""

    def failed(self, site: str, plan_id: str, error: str, message: str, how: str) -> None:
        """A plan ended without a contribution: refused, failed or left."""

    def moved(self, site: str, received: int = 0, sent: int = 0) -> None:
        """Payload bytes moved, seen from the site."""

    def troubled(self, site: str, text: str) -> None:
        """What a site sends can't be taken in just now; it sends it again."""


class Recorder(Protocol):
    """Writes down what came of contributions: here (`LedgerRecorder`), or in the daemon."""

    def accept(self, row: ContributionRow) -> Acceptance:
        """Count a contribution whose bytes are in the store, or say that it is too late."""

    def refuse(self, plan_id: str, site: str, error: str, message: str) -> None:
        """End a plan with a refusal, unless it has an answer."""

    def moved(self, site: str, received: int = 0, sent: int = 0) -> None:
        """Payload bytes moved, seen from the site."""

    def troubled(self, site: str, text: str) -> None:
        """What a site sends can't be taken in just now; it sends it again."""


class LedgerRecorder:
    """See `Recorder`.

    Args:
        ledger: Where it is written.
        round: Who is told of it.
    """

    def __init__(self, ledger: Ledger, round: Hearing) -> None:
        self._ledger, self._round = ledger, round

    def accept(self, row: ContributionRow) -> Acceptance:
        """See `Recorder.accept`."""
        acceptance = self._ledger.accept(row)
        reach("record.accepted")
        if acceptance.verdict == "counted":
            self._round.counted(row.site, acceptance.plan_id, row.digest)
            reach("record.told")
        return acceptance

    def refuse(self, plan_id: str, site: str, error: str, message: str) -> None:
        """See `Recorder.refuse`."""
        if self._ledger.plan(plan_id, site) is None:
            return
        stands = self._ledger.answer_plan(plan_id, site, "refused", error, message)
        reach("record.refused")
        if stands.answer == "refused":  # and not counted: another one was there before
            self._round.failed(site, plan_id, error, message, "refused")

    def moved(self, site: str, received: int = 0, sent: int = 0) -> None:
        """See `Recorder.moved`."""
        self._round.moved(site, received=received, sent=sent)

    def troubled(self, site: str, text: str) -> None:
        """See `Recorder.troubled`."""
        self._round.troubled(site, text)
