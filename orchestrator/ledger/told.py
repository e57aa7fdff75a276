"""What a run's chain tells, as `audit.Audit` takes it up."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.views import RoundState
from protos.plan import Plan

CLOSED_IN = ("train", "init")
"""Kinds of contributions that make a round; the others assess it."""


@dataclass(frozen=True)
class Accepted:
    """A contribution that was acknowledged as counted.

    Attributes:
        round: In which it counts; its plan may be of an earlier one.
        plan_id: The plan that its header names.
        base: The base that it names.
    """

    site: str
    kind: str
    round: int
    work_digest: str
    index: str
    plan_id: str
    base: str


@dataclass
class Attempt:
    """What the chain tells of one attempt of a round.

    Attributes:
        plans: By kind and site: the plans that were given out, by their work.
        counted: By kind, site and work: the contribution that counts for it.
        opened: Kinds of its further exchanges.
    """

    round: int
    attempt: int
    base: str
    draft: str
    state: RoundState = "planned"
    plans: dict[tuple[str, str], dict[str, Plan]] = field(default_factory=dict)
    counted: dict[tuple[str, str, str], str] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)
    closed_set: tuple[str, ...] = ()
    model: str = ""
    outer_state: str = ""
    memos: str = ""
    summary: str = ""

    def closes_in(self) -> list[str]:
        """What was acknowledged and makes the round, in the order of a closed set."""
        found = [(kind, site, c) for (kind, site, _), c in self.counted.items()]
        return [c for kind, _, c in sorted(found) if kind in CLOSED_IN]
