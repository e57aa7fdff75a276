"""Step 4: plug-ins change the candidate, each in a process without keys, network or time to waste."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Literal

from orchestrator.compute.config import Limits
from orchestrator.rounds.engine import Candidate, Engine, Planned
from orchestrator.rounds.gather import Closed
from orchestrator.views import Plugin
from protos.errors import FarflungError


def refine(engine: Engine, planned: Planned, closed: Closed, candidate: Candidate) -> Candidate:
    """The candidate after every ``refine`` hook of the round, in order.

    One that fails is skipped, with its reason in the ledger: the round's work is not thrown away.
    With ``on_error = "hold"`` the round is to be held instead.
    """
    average = candidate
    hooks = engine.stack_facts(planned.stack)["hooks"]
    for name in (c["name"] for c in planned.stack):
        if "refine" not in hooks[name]:
            continue
        start = time.monotonic()
        try:
            candidate = _one(engine, planned, closed, candidate, name, start)
        except FarflungError as error:
            seconds = time.monotonic() - start
            plugin = Plugin(name=name, state="skipped", reason=error.message, seconds=seconds)
            candidate = without(engine, planned, candidate, plugin)
            if candidate.held:
                return candidate
    return replace(candidate, average=average) if candidate.model != average.model else candidate


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
    limits = Limits(
        seconds=engine.config.plugins.seconds,
        memory_bytes=engine.config.plugins.memory_bytes,
        threads=min(engine.workers, os.cpu_count() or 1),  # of this host, also with a cluster
    )
    with engine.scratch(f"refine-{planned.name}-{name}") as folder:
        out = folder / "out"
        out.mkdir()
        payloads = {}
        for key, spec in candidate.payloads.items():
            path = folder / spec["object"]
            if not path.exists():
                path.write_bytes(engine.store.get_bytes(spec["object"]))
            payloads[key] = {**spec, "path": str(path)}
        value = engine.compute.isolated(
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
                "memo": candidate.memos.get(name, {}),
                "out": str(out),
                "device": "cpu",
            },
            limits,
        )
        model = engine.adopt_parts(value["parts"])
    plugin = Plugin(
        name=name, state="done", seconds=time.monotonic() - start, report=value["report"]
    )
    return replace(
        candidate,
        model=replace(model, frozen=planned.base.frozen),
        memos={**candidate.memos, name: value["memo"]},
        plugins=(*candidate.plugins, plugin),
    )
