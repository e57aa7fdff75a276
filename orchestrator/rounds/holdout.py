"""The candidate on the orchestrator's own data, evaluated as plug-ins are run: without keys or network."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import Literal

from orchestrator.rounds.engine import Assessment, Candidate, Engine, Planned
from orchestrator.views import Plugin
from protos.errors import FarflungError
from protos.faults import reach


def with_holdout(
    engine: Engine, planned: Planned, candidate: Candidate, assessed: Assessment
) -> tuple[Candidate, Assessment]:
    """The assessment with the scores on the holdout beside the sites'.

    If it fails, the round goes on without them and says why, or is held, as ``on_error`` says.
    """
    start = time.monotonic()
    try:
        with engine.scratch(f"holdout-{planned.name}") as folder:
            value = engine.isolated(
                "holdout",
                {
                    "task": engine.task(planned.config),
                    "stack": planned.stack,
                    "seed": planned.config.seed,
                    "parts": engine.part_args(folder, candidate.model),
                    "device": "cpu",
                },
                min(engine.workers, os.cpu_count() or 1),
            )
            reach("assess.holdout")
    except FarflungError as error:
        state: Literal["held", "skipped"]
        state = "held" if planned.config.on_error == "hold" else "skipped"
        number = planned.row.round
        text = f"the holdout was {state} in round {number}: {error.message}"
        engine.note("error", planned.run.id, number, "", text)
        seconds = time.monotonic() - start
        plugin = Plugin(name="holdout", state=state, reason=error.message, seconds=seconds)
        candidate = replace(candidate, plugins=(*candidate.plugins, plugin))
        return (replace(candidate, held=text) if state == "held" else candidate), assessed
    return candidate, replace(assessed, scores={**assessed.scores, **value["scores"]})
