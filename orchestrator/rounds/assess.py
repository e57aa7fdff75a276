"""Step 5: the candidate goes to the sites, and they answer with sums: never with samples."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.exchange import Gathered
from orchestrator.ledger import PlanKind
from orchestrator.rounds.engine import Assessment, Candidate, Engine, Planned, payload_specs
from orchestrator.rounds.plan import plan_rows
from orchestrator.small import small_model
from orchestrator.views import Plugin
from protos.contribution import Header


def assess(engine: Engine, planned: Planned, candidate: Candidate) -> Assessment | None:
    """Pooled scores of the candidate, and the calibration maps fitted to it; None if interrupted.

    Two light exchanges at most: sums of the raw outputs, from which scores and maps follow; then,
    if a map was fitted, sums of the calibrated outputs, so that its effect is measured and not
    guessed. The candidate is the next base, so fetching it costs no extra bytes.
    """
    row, every = planned.row, planned.config.assess.every
    last = row.round >= planned.run.rounds
    if every == 0 or (row.round % every and not last):
        return Assessment()
    gathered = _exchange(engine, planned, candidate, "assess", {})
    if gathered.interrupted:
        return None
    if gathered.decision.kind != "close":
        return Assessment(missing=gathered.missing)
    start = time.monotonic()
    first = _evaluate(engine, planned, "assess", True)
    fitted = first["calibration"]
    plugins = tuple(
        Plugin(
            name=name,
            state="done",
            report=first["reports"].get(name, {}),
            seconds=time.monotonic() - start,
        )
        for name in sorted(fitted)
    )
    scores, sites = first["scores"], first["sites"]
    reliability, missing = first["reliability"], dict(gathered.missing)
    if fitted:
        again = _exchange(engine, planned, candidate, "reassess", fitted)
        if again.interrupted:
            return None
        missing.update(again.missing)
        if again.decision.kind == "close":
            second = _evaluate(engine, planned, "reassess", False)
            scores = {**scores, **second["scores"]}
            reliability = {**reliability, **second["reliability"]}
            sites = {s: {**v, **second["sites"].get(s, {})} for s, v in sites.items()}
    for site, values in sites.items():
        engine.board.note(site, scores=values)
    return Assessment(True, scores, sites, reliability, fitted, plugins, missing)


def _exchange(
    engine: Engine,
    planned: Planned,
    candidate: Candidate,
    kind: PlanKind,
    calibration: dict[str, Any],
) -> Gathered:
    row = planned.row
    rows = plan_rows(
        engine, planned, row.draft["cohort"], kind, candidate.model.shared, calibration
    )
    engine.ledger.open_exchange(row.run, row.round, row.attempt, kind, rows)
    base = small_model(engine.store, candidate.model.shared)
    gathered = engine.exchange.gather(rows, row.quorum, row.deadline_s, base)
    if gathered.interrupted:
        return gathered  # it stays open: what comes meanwhile counts when it is gone on with
    engine.ledger.close_exchange(row.run, row.round, row.attempt, kind)
    engine.exchange.cancel(rows, list(gathered.missing), "the assessment was closed")
    return gathered


def _evaluate(engine: Engine, planned: Planned, kind: PlanKind, calibrate: bool) -> dict[str, Any]:
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
        args = {"stack": planned.stack, "sites": sites, "calibrate": calibrate}
        return engine.ask("assess", args)
