"""Step 1: what the sites are asked, frozen in the ledger before it goes out."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from orchestrator.ledger import PlanKind, PlanRow, RoundRow, RunRow
from orchestrator.rounds.engine import WORKER_S, Engine, Model, Planned
from orchestrator.run_config import RunConfig
from orchestrator.speeds import speeds_of, too_slow
from protos.errors import Conflict
from protos.faults import reach
from protos.plan import OptimizerChoice, Plan, Schedule, StrategyChoice, Work


def plan(engine: Engine, run: RunRow, number: int, abandoning: str = "") -> Planned:
    """The attempt of a round to go on with: one that is in the ledger, or a new one.

    Args:
        engine: The daemon's parts.
        run: The run.
        number: The round, from 1.
        abandoning: Why the attempt before is given up; empty if there is none to give up.

    Raises:
        Conflict: Fewer sites are enrolled than the quorum needs.
    """
    config = RunConfig.from_resolved(run.config)
    before = engine.ledger.last_committed(run.id)
    if before is None:
        raise Conflict(f"run {run.name}: it has no first base")
    attempts = engine.ledger.attempts(run.id, number)
    base = Model.of(before)
    if attempts and attempts[-1].state == "held":  # and the operator lets the run try it again
        abandoning = abandoning or f"tried again after it was held: {attempts[-1].reason}"
    if attempts and attempts[-1].state in ("planned", "closed") and not abandoning:
        return Planned(config, run, attempts[-1], base, before)
    attempt = attempts[-1].attempt + 1 if attempts else 1
    row, plans = _draw_up(engine, run, config, before, base, number, attempt)
    reach("round.drawn")
    engine.ledger.plan_round(row, plans, abandoning=abandoning)
    reach("round.planned")
    engine.ledger.carry_over(run.id, number, attempt)
    reach("round.carried")
    _warn(engine, row, before, config)
    return Planned(config, run, row, base, before)


def _warn(engine: Engine, row: RoundRow, before: RoundRow, config: RunConfig) -> None:
    """Say who is not expected to make the deadline."""
    deadline, work = config.cohort.deadline_s, row.draft["work"]
    speeds = speeds_of(before.summary)
    asked = ", ".join(f"{amount:g} {unit}" for unit, amount in work.items() if amount is not None)
    then = "it may be missing"
    if config.cohort.partial:
        then = "it is asked for what it has by then"
    elif config.cohort.stale:
        then = "what it has later counts in the next round"
    for site, needs in too_slow(speeds, row.draft["cohort"], work, deadline).items():
        text = (
            f"site {site} is not expected to make the deadline of round {row.round}: {asked} take it "
            f"about {needs:.3g} s, by its speed so far, and there are {deadline:g} s; {then}"
        )
        engine.note("warning", row.run, row.round, site, text)


def cohort_of(engine: Engine, run: RunRow, config: RunConfig) -> tuple[str, ...]:
    """The sites that are asked: enrolled, named by the run, and not gone from it for good."""
    enrolled = {s.name for s in engine.ledger.sites() if s.state == "enrolled"}
    wanted = sorted(enrolled) if config.cohort.sites == "all" else sorted(config.cohort.sites)
    return tuple(s for s in wanted if s in enrolled and (run.id, s) not in engine.exchange.left)


def _draw_up(
    engine: Engine,
    run: RunRow,
    config: RunConfig,
    before: RoundRow,
    base: Model,
    number: int,
    attempt: int,
) -> tuple[RoundRow, list[PlanRow]]:
    cohort = cohort_of(engine, run, config)
    asked = len(config.cohort.sites) if config.cohort.sites != "all" else len(cohort)
    quorum = asked if config.cohort.quorum == "all" else config.cohort.quorum
    if len(cohort) < max(1, quorum):
        raise Conflict(
            f"run {run.name}: {len(cohort)} sites can be asked ({', '.join(cohort) or 'none'}), "
            f"but the quorum is {max(1, quorum)}; enrol more sites or lower [cohort] quorum",
            key="cohort.quorum",
        )
    with engine.scratch(f"plan-{run.id}-{number}") as folder:
        payloads = {}
        for name, spec in before.summary.get("payloads", {}).items():
            path = folder / spec["object"]
            if not path.exists():
                path.write_bytes(engine.store.get_bytes(spec["object"]))
            payloads[name] = {**spec, "path": str(path)}
        drawn = engine.ask(
            "plan_round",
            {
                "stack": [c.model_dump(mode="json") for c in config.stack],
                "memos": before.memos,
                "payloads": payloads,
                "draft": _draft(config, run, before, number, cohort),
            },
            engine.config.plugins.seconds + WORKER_S,
        )
    manifest = engine.store.index(base.shared).manifest
    draft = {
        **drawn,
        "quorum": quorum,
        "manifest": manifest,
        "groups": sorted({t.group for t in engine.store.manifest(manifest)}),
        "frozen": base.frozen,
        "covered": None,
    }
    if config.cohort.stale:
        draft["accepts"] = [base.shared, *_older_bases(engine, run, draft, config.cohort.stale)]
    row = RoundRow(
        run=run.id,
        round=number,
        attempt=attempt,
        base=base.shared,
        draft=draft,
        quorum=quorum,
        deadline_s=config.cohort.deadline_s,
        started=time.time(),
    )
    planned = Planned(config, run, row, base, before)
    return row, plan_rows(engine, planned, drawn["cohort"], "train", base.shared)


ALIKE = ("stack", "payload", "manifest", "groups", "covered")
"""What two rounds have in common if the work for one can count in the other: the strategies that act, what
they tell the sites, and the tensors."""


def _older_bases(engine: Engine, run: RunRow, draft: dict[str, Any], stale: int) -> Iterator[str]:
    """The bases of the newest rounds in the history, newest first, as long as they are alike."""
    for row in engine.ledger.newest(run.id, stale):
        if row.round == 0 or any(row.draft.get(key) != draft.get(key) for key in ALIKE):
            return
        yield row.base


def _draft(
    config: RunConfig, run: RunRow, before: RoundRow, number: int, cohort: tuple[str, ...]
) -> dict[str, Any]:
    change = before.summary.get("relative_change")
    schedule = Schedule(shape="constant", lr=config.local.lr)
    return {
        "round": number,
        "rounds": run.rounds,
        "cohort": list(cohort),
        "work": config.local.work.model_dump(mode="json"),
        "schedule": schedule.model_dump(mode="json"),
        "optimizer": config.local.optimizer.model_dump(mode="json"),
        "batch_size": config.local.batch_size,
        "payload": {},
        "last": {
            "round": before.round,
            "relative_change": change if change is not None and math.isfinite(change) else None,
            "scores": before.summary.get("scores", {}),
            "sites": before.summary.get("counted", []),
        },
    }


def plan_rows(
    engine: Engine,
    planned: Planned,
    sites: Sequence[str],
    kind: PlanKind,
    base: str,
    calibration: dict[str, Any] | None = None,
) -> list[PlanRow]:
    """The plans of some sites: one plan, and what in it is each site's own."""
    if not sites:
        return []
    one = _plan_of(planned, sites[0], kind, base, calibration or {})
    starts = _last_counted(engine, planned, sites, kind)
    own = ({"site": site, "last_counted": starts.get(site, "")} for site in sites)
    return [plan_row(one.model_copy(update=update)) for update in own]


def _plan_of(
    planned: Planned, site: str, kind: PlanKind, base: str, calibration: dict[str, Any]
) -> Plan:
    row, config, draft = planned.row, planned.config, planned.row.draft
    return Plan(
        run=row.run,
        round=row.round,
        attempt=row.attempt,
        kind=kind,
        site=site,
        base=base,
        manifest=draft["manifest"],
        accepts=tuple(draft.get("accepts", (base,))) if kind == "train" else (base,),
        frozen=draft["frozen"],
        groups=None if draft["covered"] is None else tuple(draft["covered"]),
        task=config.task,
        stack=tuple(StrategyChoice.model_validate(c) for c in draft["stack"]),
        payload=draft["payload"] if kind == "train" else {},
        work=Work.model_validate(draft["work"]),
        schedule=Schedule.model_validate(draft["schedule"]),
        optimizer=OptimizerChoice.model_validate(draft["optimizer"]),
        batch_size=draft["batch_size"],
        seed=config.seed,
        gradient_clip=config.local.gradient_clip,
        deadline_s=config.cohort.deadline_s,
        calibration=calibration,
    )


def _last_counted(
    engine: Engine, planned: Planned, sites: Sequence[str], kind: PlanKind
) -> dict[str, str]:
    """The contributions whose states the sites start from, or evaluate with."""
    row, ledger = planned.row, engine.ledger
    counted = ledger.all_last_counted(row.run, sites, before=row.round)
    if kind != "train":
        mine = ledger.contributions(row.run, row.round, row.attempt, "train")
        counted |= {c.site: c.digest for c in mine}
    return counted


def plan_row(made: Plan) -> PlanRow:
    """A plan as the ledger keeps it."""
    return PlanRow(
        run=made.run,
        round=made.round,
        attempt=made.attempt,
        kind=made.kind,
        site=made.site,
        plan=made.encode(),
        work_digest=made.work_digest,
    )
