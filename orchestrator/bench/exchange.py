"""`farflung bench exchange`: what it costs to bring weights to all sites and back.

Everything is as it is in use: real processes, mutual TLS, spool, outbox, base cache, fsync and
signatures. Only the training is left out: each site adds a constant of its own.

The figures are medians over the rounds but the first:

    wall_s_per_round        from the beginning of one round to the beginning of the next
    cpu_s_per_round         user and system time of daemon, Ray, links and trainers together
    wire_bytes_per_round    payload over the wire, both ways

Peaks are over the whole run, and resident memory of a process tree is the sum over its processes,
so that a page which several share counts in each. Ray's figure is that of the compute process with
everything below it.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from orchestrator import views
from orchestrator.bench.floor import Floor, measure_floor
from orchestrator.bench.sampler import Group, Sampler
from orchestrator.bench.weights import TENSORS
from orchestrator.federation import Federation
from protos.chunks import write_durably
from protos.errors import ComputeFailed, DataCorrupt

COMPUTE = "orchestrator.compute"
"""Stands in the command line of the process that runs Ray."""

CONSTANT = 2.0**-10
"""Site i adds (i + 1) times this; a power of two, so that sums of it are exact for small weights."""

RUN_S = 3600.0


def run_exchange(sites: int, model_bytes: int, rounds: int, file: Path | None) -> dict[str, Any]:
    """Measure, print, and write the figures into a file.

    Args:
        sites: Site agents.
        model_bytes: Size of the model.
        rounds: At least 2; the first is left out of the medians.
        file: JSON file to write, if any.
    """
    out = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="farflung-exchange-") as folder:
        out.print(f"{sites} sites, {model_bytes / 1e6:g} MB, {rounds} rounds: starting …")
        figures = measure_exchange(Path(folder), sites, model_bytes, rounds)
    out.print("The same bytes over bare gRPC with TLS …")
    # What a site really fetched and sent, so that both carry the same.
    each_way = round(figures["wire_bytes_per_round"] / (2 * sites))
    figures |= _floor_figures(measure_floor(sites, each_way, rounds))
    if file is not None:
        write_durably(file.absolute(), (json.dumps(figures, indent=2) + "\n").encode())
    _print(figures)
    return figures


def measure_exchange(folder: Path, sites: int, model_bytes: int, rounds: int) -> dict[str, Any]:
    """The figures of this system alone; see the module's page."""
    elements = max(1, round(model_bytes / (4 * TENSORS)))
    source = f"{Path(__file__).with_name('weights.py')}:Weights"
    names = [f"site-{number:02d}" for number in range(sites)]
    tables = {
        name: {
            "tasks": {
                "weights": {"source": source, "settings": {"constant": (number + 1) * CONSTANT}}
            },
            "site": {"device": "cpu"},
            "trainer": {"threads": 1},
        }
        for number, name in enumerate(names)
    }
    config = {
        "name": "exchange",
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
    with Federation(folder, sites=tables) as federation:
        agents = federation.agents()
        groups = {
            "daemon": Group([federation.daemon.pid], apart=[COMPUTE]),
            "ray": Group([federation.daemon.pid], only=[COMPUTE]),
            **{name: Group([agents[name].pid]) for name in names},
        }
        with Sampler(groups) as sampler:
            run = federation.wait(federation.launch(config), RUN_S)
        if run.state != "finished":
            raise ComputeFailed(f"bench: the run is {run.state}: {run.reason}\n{federation.told()}")
        told = federation.rounds(run.id)
        _check_result(federation, run, folder / "export", sites)
    starts = [*(entry.started for entry in told), run.ended or 0.0]
    spans = list(pairwise(starts[1:]))  # without the first round
    measured = told[1:]
    return {
        "sites": sites,
        "model_bytes": elements * 4 * TENSORS,
        "rounds": rounds,
        "wall_s_per_round": median(end - start for start, end in spans),
        "cpu_s_per_round": median(sampler.cpu_s(start, end) for start, end in spans),
        "cpu_s_by_group": _by_group(sampler, names, spans),
        "daemon_peak_rss_bytes": sampler.peak_rss_bytes("daemon"),
        "ray_peak_rss_bytes": sampler.peak_rss_bytes("ray"),
        "site_peak_rss_bytes": max(sampler.peak_rss_bytes(name) for name in names),
        "wire_bytes_per_round": median(entry.wire_bytes for entry in measured),
        "foreign_cores": median(sampler.foreign_cores(start, end) for start, end in spans),
        "wall_s": [end - start for start, end in spans],
        "cpu_s": [sampler.cpu_s(start, end) for start, end in spans],
        "seconds_by_phase": _phases(measured),
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("farflung", "torch", "grpcio", "ray")},
        },
    }


def _by_group(
    sampler: Sampler, names: list[str], spans: list[tuple[float, float]]
) -> dict[str, float]:
    def typical(group: str) -> float:
        return median(sampler.group_cpu_s(group, start, end) for start, end in spans)

    out = {group: typical(group) for group in ("daemon", "ray")}
    return out | {"sites": sum(typical(name) for name in names)}


def _phases(rounds: list[views.Round]) -> dict[str, float]:
    names = dict.fromkeys(name for entry in rounds for name in entry.seconds)
    return {name: median(entry.seconds.get(name, 0.0) for entry in rounds) for name in names}


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


def _floor_figures(floor: Floor) -> dict[str, Any]:
    return {
        "floor_wall_s_per_round": floor.wall_s,
        "floor_cpu_s_per_round": floor.cpu_s,
        "floor_chunk_bytes": floor.chunk_bytes,
    }


def _print(figures: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "Farflung", "floor"):
        table.add_column(title, justify="left" if not title else "right")
    for what, key in (("wall, s a round", "wall_s"), ("processors, s a round", "cpu_s")):
        mine, floor = figures[f"{key}_per_round"], figures[f"floor_{key}_per_round"]
        table.add_row(what, f"{mine:.2f}", f"{floor:.2f}")
    table.add_row("on the wire, MB a round", f"{figures['wire_bytes_per_round'] / 1e6:.1f}", "")
    for what, value in figures["cpu_s_by_group"].items():
        table.add_row(f"processors, {what}, s a round", f"{value:.2f}", "")
    for what in ("daemon", "ray", "site"):
        table.add_row(f"{what}, peak MB", f"{figures[f'{what}_peak_rss_bytes'] / 1e6:.0f}", "")
    table.add_row("cores busy with other work", f"{figures['foreign_cores']:.2f}", "")
    Console().print(table)
