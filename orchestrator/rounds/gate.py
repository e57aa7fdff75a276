"""The gate: whether a round's model may become the run's, or is held until somebody decides."""

from __future__ import annotations

from statistics import median

from orchestrator.rounds.engine import Assessment, Candidate, Engine, Planned
from orchestrator.rounds.gather import Closed
from orchestrator.rounds.tolerance import JUDGES, too_much_worse

COHORT = 3
"""Fewer contributions than this don't say which of them is the outlier."""


def hold_reason(
    engine: Engine, planned: Planned, closed: Closed, candidate: Candidate, assessed: Assessment
) -> str:
    """Why a round has to be held, by the run's ``[gate]``; empty if it need not."""
    return "; ".join(
        (
            *_large(planned, closed),
            *_opposed(planned, candidate),
            *_worse(engine, planned, assessed),
        )
    )


def _large(planned: Planned, closed: Closed) -> list[str]:
    most = planned.config.gate.norm
    norms = {c.site: c.norm for c in closed.contributions if c.norm is not None}
    if most is None or len(norms) < COHORT:
        return []
    middle = median(norms.values())
    return [
        f"site {site}: the norm of its update is {norm:.4g}, more than {most:g} times the cohort's "
        f"median of {middle:.4g}"
        for site, norm in sorted(norms.items())
        if norm > most * middle
    ]


def _opposed(planned: Planned, candidate: Candidate) -> list[str]:
    least, cosines = planned.config.gate.cosine, candidate.cosines
    if least is None or len(cosines) < COHORT:
        return []
    return [
        f"site {site}: its update has a cosine of {cosine:.3f} to the sum of the others', less than "
        f"{least:g}"
        for site, cosine in sorted(cosines.items())
        if cosine < least
    ]


def _worse(engine: Engine, planned: Planned, assessed: Assessment) -> list[str]:
    """Where the model is worse than the last one that was assessed; unassessed it can't be judged."""
    tolerance, reasons = planned.config.gate.tolerance, []
    if tolerance is None:
        return []
    for split in JUDGES:
        if not _scored(assessed.scores, split):
            continue
        before = planned.before.summary.get("scores", {})
        if not _scored(before, split):
            history = reversed(engine.ledger.history(planned.run.id))
            past = (row.summary.get("scores", {}) for row in history)
            before = next((scores for scores in past if _scored(scores, split)), {})
        if before:
            reasons.append(too_much_worse(before, assessed.scores, tolerance, split))
    return [reason for reason in reasons if reason]


def _scored(scores: dict[str, float], split: str) -> bool:
    return f"{split}.accuracy" in scores or f"{split}.loss" in scores
