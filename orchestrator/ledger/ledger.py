"""The ledger: one object, one writer, one transaction per method."""

from __future__ import annotations

from orchestrator.ledger.contributions import Contributions
from orchestrator.ledger.rollbacks import Rollbacks
from orchestrator.ledger.sites import Sites


class Ledger(Sites, Rollbacks, Contributions):
    """Everything that must survive: open it with `Ledger.open`.

    Safe for use from many threads. Every method is one transaction: when it returns, what it
    did is on disk; when it raises, nothing happened. Beside the errors that each method names,
    all of them may raise `Unavailable` (somebody else holds the database), `OutOfSpace` (the
    disk is full) and `DataCorrupt` (the file is damaged).
    """
