"""One run in which weights only travel: what `bench exchange` and `bench rounds` measure.

Everything is as it is in use: real processes, mutual TLS, spool, outbox, base cache, fsync and
signatures. Only the training is left out: each site adds a constant of its own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator import views
from orchestrator.bench.sampler import Group, Sampler
from orchestrator.bench.weights import TENSORS
from orchestrator.federation import Federation
from protos.errors import ComputeFailed, DataCorrupt

COMPUTE = "orchestrator.compute"
"""Stands in the command line of the process that runs Ray."""

TRAINER = "site_agent.trainer"
"""Stands in the command line of a site's trainer."""

CONSTANT = 2.0**-10
"""Site i adds (i + 1) times this; a power of two, so that sums of it are exact for small weights."""

RUN_S = 3600.0

Grouping = Callable[[Federation], dict[str, Group]]


@dataclass(frozen=True)
class Trial:
    """What was seen of a run, without its first round.

    Attributes:
        model_bytes: Size of the model.
        rounds: The rounds as an operator sees them.
        spans: From the beginning of each to the beginning of the next; seconds since the epoch.
        sampler: Processor time and memory of the groups.
        pss_bytes: Resident memory of each group after the run, a shared page counted once in all.
    """

    model_bytes: int
    rounds: list[views.Round]
    spans: list[tuple[float, float]]
    sampler: Sampler
    pss_bytes: dict[str, int]

    @property
    def wall_s(self) -> list[float]:
        """Seconds of each round."""
        return [end - start for start, end in self.spans]

    @property
    def seconds_by_phase(self) -> dict[str, float]:
        """Median over the rounds of each phase that the rounds' views name."""
        names = dict.fromkeys(name for entry in self.rounds for name in entry.seconds)
        return {n: median(entry.seconds.get(n, 0.0) for entry in self.rounds) for n in names}


def run_trial(
    folder: Path,
    sites: int,
    model_bytes: int,
    rounds: int,
    grouping: Grouping,
    every_s: float,
    trainer: Sequence[str] = (),
    gateways: int = 0,
) -> Trial:
    """Start a federation, run, and check what came out.

    Args:
        folder: For everything that is written.
        sites: Site agents.
        model_bytes: Size of the model.
        rounds: At least 2; the first is left out.
        grouping: Which processes are added up.
        every_s: Time between two samples.
        trainer: Command of the sites' trainers; empty for the usual one.
        gateways: Processes that carry models and contributions; 0: the daemon does.
    """
    elements = max(1, round(model_bytes / (4 * TENSORS)))
    names = site_names(sites)
    daemon = {"gateways": {"processes": gateways, "bind": "127.0.0.1:0"}}
    with Federation(folder, sites=_tables(names, trainer), daemon=daemon) as federation:
        groups = grouping(federation)
        with Sampler(groups, every_s) as sampler:
            run = federation.wait(federation.launch(_config(names, elements, rounds)), RUN_S)
        if run.state != "finished":
            raise ComputeFailed(f"bench: the run is {run.state}: {run.reason}\n{federation.told()}")
        pss = {name: group.pss_bytes() for name, group in groups.items()}
        told = federation.rounds(run.id)
        _check_result(federation, run, folder / "export", sites)
    starts = [*(entry.started for entry in told), run.ended or 0.0]
    spans = list(pairwise(starts[1:]))  # without the first round
    return Trial(elements * 4 * TENSORS, told[1:], spans, sampler, pss)


def site_names(sites: int) -> list[str]:
    """The sites of a trial."""
    return [f"site-{number:02d}" for number in range(sites)]


def machine() -> dict[str, Any]:
    """What stands beside every figure."""
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("farflung", "torch", "grpcio", "ray")},
    }


def _tables(names: list[str], trainer: Sequence[str]) -> dict[str, dict[str, Any]]:
    source = f"{Path(__file__).with_name('weights.py')}:Weights"
    return {
        name: {
            "tasks": {
                "weights": {"source": source, "settings": {"constant": (number + 1) * CONSTANT}}
            },
            "site": {"device": "cpu"},
            "trainer": {"threads": 1, "command": list(trainer)},
        }
        for number, name in enumerate(names)
    }


def _config(names: list[str], elements: int, rounds: int) -> dict[str, Any]:
    return {
        "name": "weights",
        "rounds": rounds,
        "task": {"name": "weights", "params": {"elements": elements}},
        "init": {"from": f"site:{names[0]}"},
        "cohort": {"sites": names, "quorum": "all", "deadline_s": RUN_S},
        "local": {
            "work": {"steps": 1},
            "batch_size": 1,
            "lr": 1.0,
            "optimizer": {"name": "sgd", "momentum": 0.0},
        },
        "assess": {"every": 0},
        "strategy": [],
    }


def _check_result(federation: Federation, run: views.Run, folder: Path, sites: int) -> None:
    """Check that the last model is that of round 1 plus what all sites added since."""
    from safetensors.torch import load_file

    first, last = (
        load_file(
            next(
                path
                for path in federation.client.export(run.id, number, folder / number)
                if path.suffix == ".safetensors"
            )
        )
        for number in ("1", str(run.rounds))
    )
    added = (run.rounds - 1) * CONSTANT * (sites + 1) / 2
    for name, tensor in first.items():
        if name != "still" and (last[name] - tensor - added).abs().max() > 1e-4:
            raise DataCorrupt(f"bench: tensor {name} is not what the sites made of it", tensor=name)
