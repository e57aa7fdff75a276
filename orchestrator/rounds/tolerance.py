"""The gate: what plug-ins made of the average, by the sites' validation data, and what is tolerated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, Literal

from orchestrator.rounds.engine import Assessment, Candidate, Engine, Planned
from orchestrator.rounds.refine import without

JUDGES: Final[Mapping[Literal["val", "holdout"], str]] = {"val": "validation", "holdout": "holdout"}
"""Scores that steer, and what people call the data behind them."""


def judged(planned: Planned, candidate: Candidate) -> bool:
    """Whether what plug-ins did to a candidate has to be judged."""
    return planned.config.tolerance is not None and candidate.average is not None


def too_many_to_blame(
    planned: Planned, candidate: Candidate, after: Assessment, before: Assessment
) -> bool:
    """Whether a candidate is too bad, and several plug-ins had a part in it."""
    tolerance = planned.config.tolerance
    several = sum(p.state == "done" for p in candidate.plugins) > 1
    return (
        several
        and tolerance is not None
        and bool(too_much_worse(before.scores, after.scores, tolerance))
    )


def judge(
    engine: Engine,
    planned: Planned,
    candidate: Candidate,
    after: Assessment,
    before: Assessment,
) -> tuple[Candidate, Assessment]:
    """The candidate, or the average that it was made of, with its assessment.

    What is tolerated has to be shown: without both assessments the average is taken.

    Args:
        engine: The daemon's parts.
        planned: The round.
        candidate: As plug-ins left it; one that `judged` says has to be.
        after: Of the candidate.
        before: Of the average.
    """
    tolerance, average = planned.config.tolerance, candidate.average
    if tolerance is None or average is None:
        return candidate, after
    reason = too_much_worse(before.scores, after.scores, tolerance)
    if not reason:
        return candidate, after
    failed = [
        p.model_copy(update={"reason": reason}) for p in candidate.plugins if p.state == "done"
    ]
    kept = tuple(p for p in candidate.plugins if p.state != "done")
    average = without(engine, planned, replace(average, plugins=kept), *failed)
    return average, replace(before, missing={**after.missing, **before.missing})


def too_much_worse(
    before: Mapping[str, float],
    after: Mapping[str, float],
    tolerance: float,
    split: Literal["val", "holdout"] = "val",
) -> str:
    """By how much a model is worse than what is tolerated, in words; empty if it is not.

    Args:
        before: Pooled scores of the model as it was.
        after: The same as it is now.
        tolerance: The fall of the accuracy, or the relative rise of the loss where a task has no
            accuracy, that is still tolerated.
        split: Whose data judges: the sites', or the orchestrator's.
    """
    name = f"{split}.accuracy"
    if name in before and name in after:
        fall = before[name] - after[name]
        if fall <= tolerance:
            return ""
        return (
            f"{JUDGES[split]} accuracy fell by {100 * fall:.2f} points, from {100 * before[name]:.2f} % "
            f"to {100 * after[name]:.2f} %; {100 * tolerance:g} are tolerated"
        )
    name = f"{split}.loss"
    if name in before and name in after:
        if after[name] <= before[name] + tolerance * abs(before[name]):
            return ""
        return (
            f"the {JUDGES[split]} loss rose from {before[name]:.4g} to {after[name]:.4g}; "
            f"{100 * tolerance:g} % of it are tolerated"
        )
    return "the sites did not assess it both with and without the plug-in on validation data"
