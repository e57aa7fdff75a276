"""Round 0: the first base, from a task, a file, a round of another run, or a site."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

from orchestrator.exchange import Terms
from orchestrator.ledger import ContributionRow, RoundRow, RunRow
from orchestrator.rounds.engine import Engine, Model, payload_specs
from orchestrator.rounds.page import Outcome
from orchestrator.rounds.plan import plan_row
from orchestrator.run_config import RunConfig
from protos.contribution import Header
from protos.errors import ContributionRefused, InvalidInput, NotFound
from protos.faults import reach
from protos.manifest import Manifest
from protos.plan import Plan, Schedule, Work

START = re.compile(r"(?P<run>[^@]+)@(?P<round>best|\d+)\Z")


def first(engine: Engine, run: RunRow, abandoning: str = "") -> Outcome:
    """Make and commit round 0.

    Args:
        engine: The daemon's parts.
        run: The run.
        abandoning: Why the attempt before is given up; empty if there is none.
    """
    config = RunConfig.from_resolved(run.config)
    start = config.init.start
    attempts = [r for r in engine.ledger.rounds(run.id, all_attempts=True) if r.round == 0]
    if start.startswith("site:"):
        return _from_site(engine, run, config, attempts, abandoning)
    row = attempts[-1] if attempts and attempts[-1].state in ("planned", "closed") else None
    if row is None:
        number = attempts[-1].attempt + 1 if attempts else 1
        row = RoundRow(run=run.id, round=0, attempt=number, started=time.time())
        engine.ledger.plan_round(row)
        reach("first.planned")
    if row.state == "planned":
        engine.ledger.close_round(run.id, 0, row.attempt, (), "no exchange is needed")
        reach("first.closed")
    if run.parent is not None:
        parent = engine.ledger.round(*run.parent)
        own = {"files": parent.summary.get("files", {})}
        model = _as_asked(engine, run, config, parent)
        if model == Model.of(parent):
            # The map was fitted to this model, whatever the run is that goes on from it.
            own["calibration"] = parent.summary.get("calibration", {})
        return _commit(engine, run, row.attempt, model, start, own)
    with engine.scratch(f"first-{run.id}") as folder:
        out = folder / "out"
        out.mkdir()
        args: dict[str, Any] = {"out": str(out), "seed": config.seed, "start": ""}
        args["stack"] = [c.model_dump(mode="json") for c in config.stack]
        if config.init.digest:
            given = folder / "start.safetensors"
            given.write_bytes(engine.store.get_bytes(config.init.digest))
            args["start"] = str(given)
        if config.task.name in engine.config.tasks or not args["start"]:
            parts = engine.isolated("first_model", {**args, "task": engine.task(config)})
        else:
            parts = engine.isolated("from_safetensors", args)
        reach("first.made")
        model = engine.adopt_parts(parts)
        reach("first.adopted")
    return _commit(engine, run, row.attempt, model, start)


def _as_asked(engine: Engine, run: RunRow, config: RunConfig, parent: RoundRow) -> Model:
    """The model of a round of another run, changed as this run's strategies change models.

    As it is if they change none, if that run's did the same, or if this orchestrator does not have
    the task: then sites whose model is another one say so.
    """
    stack = [c.model_dump(mode="json") for c in config.stack]
    hooks = engine.stack_facts(stack)["hooks"]
    before = RunConfig.from_resolved(engine.ledger.run(parent.run).config)
    known = [(c.name, c.params) for c in before.stack] if before.task == config.task else []
    new = [c for c in config.stack if "build" in hooks[c.name] and (c.name, c.params) not in known]
    model = Model.of(parent)
    if not new or config.task.name not in engine.config.tasks:
        return model
    with engine.scratch(f"first-{run.id}") as folder:
        out = folder / "out"
        out.mkdir()
        parts = engine.part_args(folder, model)
        args = {"out": str(out), "seed": config.seed, "parts": parts, "stack": stack}
        return engine.adopt_parts(
            engine.isolated("first_model", {**args, "task": engine.task(config)})
        )


def _commit(
    engine: Engine,
    run: RunRow,
    attempt: int,
    model: Model,
    source: str,
    own: dict[str, Any] | None = None,
) -> Outcome:
    row = engine.ledger.commit_round(
        run.id,
        0,
        attempt,
        model=model.shared,
        summary={
            "frozen": model.frozen,
            "orchestrator": model.orchestrator,
            "source": source,
            **(own or {}),
            "finished": time.time(),
        },
    )
    return Outcome("committed", row=row)


def parse_start(start: str) -> tuple[str, str] | None:
    """(run, round) of "RUN@ROUND" or "RUN@best"; None for anything else."""
    match = START.match(start)
    return (match["run"], match["round"]) if match else None


# -- from a site ------------------------------------------------------------------------------------


def _from_site(
    engine: Engine, run: RunRow, config: RunConfig, attempts: list[RoundRow], abandoning: str
) -> Outcome:
    site = config.init.start.removeprefix("site:")
    if site not in {s.name for s in engine.ledger.sites() if s.state == "enrolled"}:
        raise NotFound(f'init: no site "{site}" is enrolled', key="init.from", site=site)
    row = attempts[-1] if attempts and attempts[-1].state in ("planned", "closed") else None
    if row is None or abandoning:
        number = attempts[-1].attempt + 1 if attempts else 1
        row = RoundRow(
            run=run.id,
            round=0,
            attempt=number,
            quorum=1,
            deadline_s=config.cohort.deadline_s,
            started=time.time(),
        )
        asked = Plan(
            run=run.id,
            round=0,
            attempt=number,
            kind="init",
            site=site,
            task=config.task,
            stack=config.stack,
            work=Work(steps=1),
            schedule=Schedule(lr=config.local.lr),
            seed=config.seed,
            deadline_s=config.cohort.deadline_s,
        )
        engine.ledger.plan_round(row, [plan_row(asked)], abandoning=abandoning)
        engine.ledger.carry_over(run.id, 0, number)
    plans = engine.ledger.plans(run.id, 0, row.attempt)
    engine.board.begin(run.id, 0, row.attempt, [site])
    if row.state == "planned":
        seconds = row.started + row.deadline_s - time.time()
        terms = Terms(1, seconds, config.cohort.deadline_s)
        gathered = engine.exchange.gather(plans, terms)
        if gathered.interrupted:
            return Outcome("interrupted")
        if gathered.decision.kind != "close":
            return Outcome("again", gathered.decision.reason)
        engine.ledger.close_round(run.id, 0, row.attempt, None, gathered.decision.reason)
    contribution = engine.ledger.contributions(run.id, 0, row.attempt, "init")[0]
    model = _take_apart(engine, run, contribution)
    return _commit(engine, run, row.attempt, model, config.init.start)


def _take_apart(engine: Engine, run: RunRow, row: ContributionRow) -> Model:
    """The parts of a model that a site sent as one contribution."""
    with engine.scratch(f"first-{run.id}") as folder:
        path = engine.store.lend(row.index, folder)
        return engine.adopt_parts(_parts(row, payload_specs(engine, row, folder), path, folder))


def _parts(
    row: ContributionRow, specs: dict[str, dict[str, Any]], path: Path, folder: Path
) -> dict[str, dict[str, str]]:
    def read(name: str) -> bytes:
        start = specs[name]["offset"]
        with path.open("rb") as file:
            return os.pread(file.fileno(), specs[name]["nbytes"], start)

    manifest = Manifest.decode(read("init/manifest"))
    start = min(s["offset"] for s in specs.values())
    if start != manifest.nbytes or manifest.digest != Header.decode(row.header).manifest:
        raise ContributionRefused(
            f"site {row.site}: its first model has {start} bytes where its manifest says "
            f"{manifest.nbytes}",
            site=row.site,
        )
    parts = {"shared": _part(folder / "shared.data", path, 0, start, manifest)}
    for place in ("frozen", "orchestrator"):
        spec = specs.get(f"init/{place}")
        if spec is None:
            continue
        part = Manifest.decode(read(f"init/{place}_manifest"))
        if spec["nbytes"] != part.nbytes:
            raise InvalidInput(f"site {row.site}: the {place} part does not fit its manifest")
        at = spec["offset"]
        parts[place] = _part(folder / f"{place}.data", path, at, at + part.nbytes, part)
    return parts


def _part(out: Path, source: Path, start: int, stop: int, manifest: Manifest) -> dict[str, str]:
    with source.open("rb") as given, out.open("wb") as file:
        given.seek(start)
        left = stop - start
        while left > 0 and (data := given.read(min(1 << 20, left))):
            file.write(data)
            left -= len(data)
    return {"manifest": manifest.encoded.decode(), "path": str(out)}
