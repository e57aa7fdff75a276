"""Step 5: the candidate goes to the sites, and they answer with sums: never with samples."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from orchestrator.compute.errors import ComputeTimedOut
from orchestrator.exchange import Gathered, Terms
from orchestrator.ledger import PlanKind
from orchestrator.rounds.engine import (
    WORKER_S,
    Assessment,
    Candidate,
    Engine,
    Planned,
    payload_specs,
)
from orchestrator.rounds.gather import Closed, goes_on
from orchestrator.rounds.holdout import with_holdout
from orchestrator.rounds.plan import plan_rows
from orchestrator.rounds.refine import refined_by, without
from orchestrator.rounds.tolerance import judge, judged, too_many_to_blame, too_much_worse
from orchestrator.small import small_model
from orchestrator.views import Plugin
from protos.contribution import Header
from protos.faults import reach

HOOKS = frozenset({"calibrate", "rate"})
"""Of a strategy that has something to say about the sites' sums."""


def assess(
    engine: Engine, planned: Planned, closed: Closed, candidate: Candidate
) -> tuple[Candidate, Assessment] | None:
    """What is committed, with its pooled scores and calibration maps; None if interrupted.

    Light exchanges: sums of the raw outputs, from which scores and maps follow; then, if a map was
    fitted, sums of the calibrated outputs, so that its effect is measured and not guessed, and
    whatever looks at calibrated outputs sees them. The candidate is the next base, so fetching it
    costs no extra bytes.

    If plug-ins changed the average and the run has a tolerance, the average is assessed too, and is
    what is committed if they made it worse than that. Of several, those that did are then found by
    having each try alone.
    """
    row, every = planned.row, planned.config.assess.every
    last, gate = row.round >= planned.run.rounds, judged(planned, candidate)
    if not gate and (every == 0 or (row.round % every and not last)):
        return candidate, Assessment()
    assessed = _assessed(engine, planned, candidate, "assess")
    if gate and assessed is not None and candidate.average is not None:
        average: Assessment | None = Assessment()
        if assessed.done:
            average = _assessed(engine, planned, candidate.average, "baseline")
        if average is None:
            return None
        if average.done and too_many_to_blame(planned, candidate, assessed, average):
            found = _one_by_one(engine, planned, closed, candidate, average)
            if found is None:
                return None
            candidate, assessed = found
        else:
            candidate, assessed = judge(engine, planned, candidate, assessed, average)
    if assessed is not None and assessed.again and not candidate.held:
        assessed = _calibrated(engine, planned, candidate, assessed)
    if assessed is None:
        return None
    if planned.config.assess.holdout and not candidate.held:
        candidate, assessed = with_holdout(engine, planned, candidate, assessed)
    failed = {p.name: p for p in assessed.plugins if p.state == "skipped"}
    if failed and not candidate.held:
        left = tuple(p for p in assessed.plugins if p.name not in failed)
        candidate = without(engine, planned, candidate, *failed.values())
        assessed = replace(assessed, plugins=left)
    for site, values in assessed.sites.items():
        engine.board.note(site, scores=values)
    return candidate, assessed


def _one_by_one(
    engine: Engine, planned: Planned, closed: Closed, candidate: Candidate, before: Assessment
) -> tuple[Candidate, Assessment] | None:
    """What is left when each plug-in starts from what is good so far; None if interrupted.

    Args:
        engine: The daemon's parts.
        planned: The round.
        closed: Its contributions.
        candidate: As all of them left it, which was too bad.
        before: Of the average.
    """
    average, tolerance = candidate.average, planned.config.tolerance
    if average is None or tolerance is None:
        return candidate, before
    failed = tuple(p for p in candidate.plugins if p.state != "done")
    good, known = replace(average, plugins=failed), before
    for name in (p.name for p in candidate.plugins if p.state == "done"):
        tried = refined_by(engine, planned, closed, good, name)
        if tried.model == good.model or tried.held:
            good = tried
        else:
            after = _assessed(engine, planned, tried, "assess")
            if after is None:
                return None
            reason = too_much_worse(known.scores, after.scores, tolerance)
            if reason:
                spoilt = tried.plugins[-1].model_copy(update={"reason": reason})
                good = without(engine, planned, good, spoilt)
            else:
                good, known = tried, after
        if good.held:
            break
    return good, known


def _assessed(
    engine: Engine, planned: Planned, candidate: Candidate, kind: PlanKind
) -> Assessment | None:
    """Scores of the raw outputs and the maps fitted to them; None if interrupted."""
    gathered = _exchange(engine, planned, candidate, kind, {})
    if gathered.interrupted:
        return None
    if gathered.decision.kind != "close":
        return Assessment(missing=gathered.missing)
    start = time.monotonic()
    found = evaluate(engine, planned, kind, True)
    reach("assess.scored")
    return Assessment(
        True,
        found["scores"],
        found["sites"],
        found["reliability"],
        {**found["calibration"], **found["settled"]},
        _reports(found, start),
        dict(gathered.missing),
        again=bool(found["calibration"]) or found["awaited"],
    )


def _calibrated(
    engine: Engine, planned: Planned, candidate: Candidate, assessed: Assessment
) -> Assessment | None:
    """An assessment with what its maps do; None if interrupted."""
    start = time.monotonic()
    gathered = _exchange(engine, planned, candidate, "reassess", assessed.calibration)
    if gathered.interrupted:
        return None
    assessed = replace(assessed, missing={**assessed.missing, **gathered.missing})
    if gathered.decision.kind != "close":
        return assessed
    second = evaluate(engine, planned, "reassess", False)
    reach("assess.rated")
    return replace(
        assessed,
        scores={**assessed.scores, **second["scores"]},
        reliability={**assessed.reliability, **second["reliability"]},
        sites={s: {**v, **second["sites"].get(s, {})} for s, v in assessed.sites.items()},
        calibration={**assessed.calibration, **second["settled"]},
        plugins=(*assessed.plugins, *_reports(second, start)),
    )


def _reports(found: dict[str, Any], start: float) -> tuple[Plugin, ...]:
    seconds = time.monotonic() - start
    done = [
        Plugin(name=name, state="done", report=report, seconds=seconds)
        for name, report in sorted(found["reports"].items())
    ]
    failed = [
        Plugin(name=name, state="skipped", reason=reason, seconds=seconds)
        for name, reason in sorted(found["failed"].items())
    ]
    return (*done, *failed)


def _exchange(
    engine: Engine,
    planned: Planned,
    candidate: Candidate,
    kind: PlanKind,
    calibration: dict[str, Any],
) -> Gathered:
    row = planned.row
    busy = _still_at_work(engine, planned)
    asked = [site for site in row.draft["cohort"] if site not in busy]
    rows = plan_rows(engine, planned, asked, kind, candidate.model.shared, calibration)
    engine.ledger.open_exchange(row.run, row.round, row.attempt, kind, rows)
    reach("assess.opened")
    base = small_model(engine.store, candidate.model.shared)
    terms = Terms(row.quorum, row.deadline_s, planned.config.cohort.deadline_s)
    gathered = engine.exchange.gather(rows, terms, base)
    if gathered.interrupted:
        return gathered  # it stays open: what comes meanwhile counts when it is gone on with
    reach("assess.gathered")
    engine.ledger.close_exchange(row.run, row.round, row.attempt, kind)
    reach("assess.closed")
    engine.exchange.cancel(rows, list(gathered.missing), "the assessment was closed")
    missing = {
        **gathered.missing,
        **dict.fromkeys(busy, f"not asked: it goes on with round {row.round}"),
    }
    return replace(gathered, missing=dict(sorted(missing.items())))


def _still_at_work(engine: Engine, planned: Planned) -> tuple[str, ...]:
    """Sites that go on with the round that was closed without them."""
    row = planned.row
    if not goes_on(planned):
        return ()
    plans = engine.ledger.plans(row.run, row.round, row.attempt)
    return tuple(p.site for p in plans if p.kind == "train" and not p.answer)


def evaluate(engine: Engine, planned: Planned, kind: PlanKind, calibrate: bool) -> dict[str, Any]:
    """What follows from the sums that count for an exchange; see `arithmetic.assessment.assess`."""
    row = planned.row
    rows = engine.ledger.contributions(row.run, row.round, row.attempt, kind)
    with engine.scratch(f"assess-{planned.name}") as folder:
        sites = [
            {
                "site": c.site,
                "examples": Header.decode(c.header).examples,
                "payloads": payload_specs(engine, c, folder),
            }
            for c in sorted(rows, key=lambda c: c.site)
        ]
        limits = engine.config.plugins
        args = {
            "stack": planned.stack,
            "sites": sites,
            "calibrate": calibrate,
            "seconds": limits.seconds,
            "memory_bytes": limits.memory_bytes,
        }
        # Each strategy keeps to its own bounds, or the worker ends with whoever does not.
        bound = (len(planned.stack) + 1) * limits.seconds + WORKER_S
        try:
            return engine.ask("assess", args, bound)
        except ComputeTimedOut as error:
            names = [
                c["name"] for c in planned.stack if not HOOKS.isdisjoint(_hooks(engine, planned, c))
            ]
            found = engine.ask("assess", {**args, "without": names}, bound)
            return {**found, "failed": dict.fromkeys(names, error.message)}


def _hooks(engine: Engine, planned: Planned, choice: dict[str, Any]) -> list[str]:
    names: list[str] = engine.stack_facts(planned.stack)["hooks"][choice["name"]]
    return names
