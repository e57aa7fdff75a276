"""Step 4: plug-ins change the candidate, each in a process without keys, network or time to waste."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from orchestrator.ledger import ContributionRow
from orchestrator.rounds.engine import Candidate, Engine, Planned, payload_specs
from orchestrator.rounds.gather import Closed
from orchestrator.views import Plugin
from protos.errors import FarflungError
from protos.faults import reach


def refine(engine: Engine, planned: Planned, closed: Closed, candidate: Candidate) -> Candidate:
    """The candidate after every ``refine`` hook of the round, in order.

    One that fails is skipped, with its reason in the ledger: the round's work is not thrown away.
    With ``on_error = "hold"`` the round is to be held instead.
    """
    average = candidate
    hooks = engine.stack_facts(planned.stack)["hooks"]
    for name in (c["name"] for c in planned.stack):
        if "refine" in hooks[name]:
            candidate = refined_by(engine, planned, closed, candidate, name)
            if candidate.held:
                return candidate
    return replace(candidate, average=average) if candidate.model != average.model else candidate


def refined_by(
    engine: Engine, planned: Planned, closed: Closed, candidate: Candidate, name: str
) -> Candidate:
    """The candidate after one strategy's hook, or without it if that fails."""
    start = time.monotonic()
    try:
        return _one(engine, planned, closed, candidate, name, start)
    except FarflungError as error:
        seconds = time.monotonic() - start
        plugin = Plugin(name=name, state="skipped", reason=error.message, seconds=seconds)
        return without(engine, planned, candidate, plugin)


def without(engine: Engine, planned: Planned, candidate: Candidate, *failed: Plugin) -> Candidate:
    """The candidate that some plug-ins have no part in, and why; held if the run says so."""
    state: Literal["held", "skipped"] = "held" if planned.config.on_error == "hold" else "skipped"
    plugins = tuple(plugin.model_copy(update={"state": state}) for plugin in failed)
    text = "; ".join(
        f"strategy {p.name} was {state} in round {planned.row.round}: {p.reason}" for p in plugins
    )
    engine.note("error", planned.run.id, planned.row.round, "", text)
    held = text if state == "held" else ""
    return replace(candidate, plugins=(*candidate.plugins, *plugins), held=held)


def _one(
    engine: Engine, planned: Planned, closed: Closed, candidate: Candidate, name: str, start: float
) -> Candidate:
    threads = min(engine.workers, os.cpu_count() or 1)  # of this host, also with a cluster
    with engine.scratch(f"refine-{planned.name}-{name}") as folder:
        out = folder / "out"
        out.mkdir()
        payloads = {
            name: {**spec, "path": _object(engine, spec["object"], folder)}
            for name, spec in candidate.payloads.items()
        }
        reach("refine.begun")
        value = engine.isolated(
            "refine",
            {
                "task": engine.task(planned.config),
                "stack": planned.stack,
                "seed": planned.config.seed,
                "strategy": name,
                "round": planned.row.round,
                "parts": engine.part_args(folder, candidate.model),
                "base": str(engine.store.lend(planned.base.shared, folder)),
                "covered": planned.row.draft["covered"],
                "sources": [
                    {
                        "site": c.site,
                        "payload": str(engine.store.lend(c.index, folder)),
                        "header": str(engine.header_file(folder, c)),
                        "weights": [candidate.weights[c.site]],
                    }
                    for c in closed.contributions
                ],
                "payloads": payloads,
                "site_payloads": {c.site: _sent(engine, c, folder) for c in closed.contributions},
                "memo": candidate.memos.get(name, {}),
                "files": {
                    key: _object(engine, spec["object"], folder)
                    for key, spec in candidate.files.items()
                },
                "out": str(out),
                "device": "cpu",
            },
            threads,
        )
        reach("refine.done")
        model = engine.adopt_parts(value["parts"])
        reach("refine.adopted")
        new = {key: _stored(engine, Path(path)) for key, path in value["files"].items()}
        reach("refine.files.stored")
    files = {**candidate.files, **new}
    plugin = Plugin(
        name=name,
        state="done",
        seconds=time.monotonic() - start,
        cpu_seconds=value["cpu_seconds"],
        report=value["report"],
        files={key.removeprefix(f"{name}/"): spec["object"] for key, spec in new.items()},
    )
    return replace(
        candidate,
        model=replace(model, frozen=planned.base.frozen),
        memos={**candidate.memos, name: value["memo"]},
        plugins=(*candidate.plugins, plugin),
        files={key: files[key] for key in value["kept"]},
    )


def _object(engine: Engine, name: str, folder: Path) -> str:
    """An object of the store as a file in a scratch folder."""
    path = folder / name
    if not path.exists():
        path.write_bytes(engine.store.get_bytes(name))
    return str(path)


def _stored(engine: Engine, path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"object": engine.store.put_bytes(data), "nbytes": len(data)}


def _sent(engine: Engine, row: ContributionRow, folder: Path) -> dict[str, dict[str, Any]]:
    """The side payloads of one site, in a file: a plug-in has no way to the store."""
    specs = payload_specs(engine, row, folder)
    path = str(engine.store.lend(row.index, folder)) if specs else ""
    return {name: {**spec, "path": path} for name, spec in specs.items()}
