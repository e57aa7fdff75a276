"""How fast each site is, learned from its last round, and what follows for the next one.

Seconds are the orchestrator's, between a site's messages. A site that was late, or cut, is measured too:
by what it had done when the round closed. Preparing is not in it, since it does not run against a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.views import SitePhase

CLOSING = ("encoding", "sending")
AROUND = ("fetching", *CLOSING)

AT_LEAST_S = 1.0
"""For the step that is under way, and the messages."""

MARGIN, UNKNOWN = 1 / 20, 1 / 10
"""Shares of the deadline: kept free in any case, and for the closing of a site that is not known."""


@dataclass(frozen=True)
class Speed:
    """One site's.

    Attributes:
        unit: epochs, steps, tokens or seconds.
        per_unit_s: Seconds of training for one of them.
        around_s: Seconds for fetching, encoding and sending.
        closing_s: Seconds for encoding and sending.
    """

    unit: str
    per_unit_s: float
    around_s: float
    closing_s: float

    def expected_s(self, work: Mapping[str, float | None]) -> float | None:
        """Seconds for some work; None if it is in another unit than what was measured."""
        if (seconds := work.get("seconds")) is not None:
            return seconds + self.around_s
        amount = work.get(self.unit)
        return None if amount is None else self.per_unit_s * amount + self.around_s

    def facts(self) -> dict[str, Any]:
        """As a round's summary has it."""
        return asdict(self)


def measured(phases: Iterable[SitePhase], unit: str, done: float, now: float) -> Speed | None:
    """A site's speed.

    Args:
        phases: What it did in a round.
        unit: Of ``done``.
        done: The work done in its training phases.
        now: The end of a phase that is still under way.

    Returns:
        None if it did not train long enough to be seen.
    """
    seconds: dict[str, float] = {}
    for phase in phases:
        took = max(0.0, (now if phase.end is None else phase.end) - phase.start)
        seconds[phase.state] = seconds.get(phase.state, 0.0) + took
    if done <= 0 or not seconds.get("training") or not unit:
        return None
    around, closing = (sum(seconds.get(name, 0.0) for name in part) for part in (AROUND, CLOSING))
    return Speed(unit, seconds["training"] / done, around, closing)


def speeds_of(summary: Mapping[str, Any]) -> dict[str, Speed]:
    """What a round's summary says of all sites that were measured so far."""
    return {site: Speed(**facts) for site, facts in summary.get("speeds", {}).items()}


def lead_s(speed: Speed | None, deadline_s: float) -> float:
    """How long before its deadline a site has to stop training, to encode and send what it has."""
    closing = deadline_s * UNKNOWN if speed is None else 2 * speed.closing_s
    return min(deadline_s / 2, AT_LEAST_S + deadline_s * MARGIN + closing)


def too_slow(
    speeds: Mapping[str, Speed],
    sites: Iterable[str],
    work: Mapping[str, float | None],
    deadline_s: float,
) -> dict[str, float]:
    """The sites that are expected to miss a deadline, with the seconds that they need."""
    found = {}
    for site in sites:
        needs = speeds[site].expected_s(work) if site in speeds else None
        if needs is not None and needs > deadline_s:
            found[site] = needs
    return found
