"""What the orchestrator remembers: sites, runs, rounds, plans, contributions, and what went on.

`Ledger` is durable and small: few rows by one writer, each method one transaction. `EventLog`
is the second file: much, in batches, and nothing that a round depends on.
"""

from orchestrator.ledger.events import EventLog
from orchestrator.ledger.ledger import Ledger
from orchestrator.ledger.rows import (
    Acceptance,
    Answer,
    CertificateRow,
    ContributionRow,
    Entry,
    MemberState,
    PlanKind,
    PlanRow,
    RoundRow,
    RunRow,
    SignatureRow,
    SiteRow,
    TokenRow,
)
from orchestrator.ledger.signatures import Signer

__all__ = [
    "Acceptance",
    "Answer",
    "CertificateRow",
    "ContributionRow",
    "Entry",
    "EventLog",
    "Ledger",
    "MemberState",
    "PlanKind",
    "PlanRow",
    "RoundRow",
    "RunRow",
    "SignatureRow",
    "Signer",
    "SiteRow",
    "TokenRow",
]
