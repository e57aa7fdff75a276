"""`farflung bench rounds`: the cost of a round itself, on a model so small that its bytes are free.

The work is that of `bench exchange`. The figures, without the first round:

    wall_s_per_round      median, from the beginning of one round to the beginning of the next
    cpu_s_per_round       user and system time of all processes over all these rounds, divided by
                          their number: a round is too short for the kernel's clock ticks
    cpu_s_by_group        the same for daemon, Ray, links and trainers
    site_pss_bytes        memory of a link and of a trainer after the run, mean over the sites; a
                          page that n processes share counts 1/n in each

From `MANY` sites on the trainers are forked from one process that has loaded torch, since 64 times
260 MB would not fit: processes of their own as ever, which share what they don't change.

The floor is bare gRPC with mutual TLS with the synced writes that the guarantees need, and nothing
else; see `orchestrator/bench/floor.py`.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.bench.floor import measure_floor
from orchestrator.bench.nursery import Nursery
from orchestrator.bench.sampler import Group
from orchestrator.bench.trial import COMPUTE, TRAINER, Trial, machine, run_trial
from orchestrator.federation import Federation
from protos.chunks import write_durably

MODEL_BYTES = 40_000

MANY = 16
"""From so many sites on, trainers are forked from one process; see `orchestrator/bench/nursery.py`."""

GROUPS = ("daemon", "ray", "links", "trainers")


def run_rounds(sites: int, rounds: int, file: Path | None) -> dict[str, Any]:
    """Measure, print, and write the figures into a file.

    Args:
        sites: Site agents; each is a link and a trainer, processes of their own.
        rounds: At least 3; the first is left out.
        file: JSON file to write, if any.
    """
    out = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="farflung-rounds-") as folder:
        out.print(f"{sites} sites, {MODEL_BYTES / 1e3:g} KB, {rounds} rounds: starting …")
        trial = _trial(Path(folder), sites, rounds)
    figures = _figures(trial, sites, rounds)
    out.print("The same calls and synced writes over bare gRPC with TLS …")
    floor = measure_floor(sites, trial.model_bytes, rounds, durable=True)
    figures |= {"floor_wall_s_per_round": floor.wall_s, "floor_cpu_s_per_round": floor.cpu_s}
    if file is not None:
        write_durably(file.absolute(), (json.dumps(figures, indent=2) + "\n").encode())
    _print(figures)
    return figures


def _trial(folder: Path, sites: int, rounds: int) -> Trial:
    # Reading the counters of 200 processes costs 4 ms.
    every_s = 0.05 if sites < MANY else 0.5
    with ExitStack() as stack:
        nursery = None
        if sites >= MANY:
            nursery = Nursery(folder)
            stack.callback(nursery.close)

        def groups(federation: Federation) -> dict[str, Group]:
            daemon, agents = federation.daemon.pid, [a.pid for a in federation.agents().values()]
            trainers = Group(agents, only=[TRAINER]) if nursery is None else Group([nursery.pid])
            return {
                "daemon": Group([daemon], apart=[COMPUTE]),
                "ray": Group([daemon], only=[COMPUTE]),
                "links": Group(agents, apart=[TRAINER]),
                "trainers": trainers,
            }

        command = nursery.command if nursery is not None else ()
        return run_trial(folder, sites, MODEL_BYTES, rounds, groups, every_s, command)


def _figures(trial: Trial, sites: int, rounds: int) -> dict[str, Any]:
    start, end = trial.spans[0][0], trial.spans[-1][1]
    sampler, count = trial.sampler, len(trial.spans)
    walls = trial.wall_s
    return {
        "sites": sites,
        "model_bytes": trial.model_bytes,
        "rounds": rounds,
        "trainers_forked": sites >= MANY,
        "wall_s_per_round": median(walls),
        "wall_s_quartiles": quantiles(walls, n=4),
        "cpu_s_per_round": sampler.cpu_s(start, end) / count,
        "cpu_s_by_group": {g: sampler.cpu_s(start, end, g) / count for g in GROUPS},
        "daemon_pss_bytes": trial.pss_bytes["daemon"],
        "daemon_peak_rss_bytes": sampler.peak_rss_bytes("daemon"),
        "ray_pss_bytes": trial.pss_bytes["ray"],
        "site_pss_bytes": {
            "link": trial.pss_bytes["links"] / sites,
            "trainer": trial.pss_bytes["trainers"] / sites,
        },
        "all_pss_bytes": sum(trial.pss_bytes.values()),
        "wire_bytes_per_round": median(entry.wire_bytes for entry in trial.rounds),
        "foreign_cores": sampler.foreign_cores(start, end),
        "wall_s": walls,
        "seconds_by_phase": trial.seconds_by_phase,
        "machine": machine(),
    }


def _print(figures: dict[str, Any]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("", "Farflung", "floor", "ratio"):
        table.add_column(title, justify="left" if not title else "right")
    for what, key in (("wall, ms a round", "wall_s"), ("processors, ms a round", "cpu_s")):
        mine, floor = figures[f"{key}_per_round"], figures[f"floor_{key}_per_round"]
        table.add_row(what, f"{1e3 * mine:.0f}", f"{1e3 * floor:.0f}", f"{mine / floor:.1f}")
    for group, seconds in figures["cpu_s_by_group"].items():
        table.add_row(f"  {group}", f"{1e3 * seconds:.0f}")
    memory = {
        "daemon": figures["daemon_pss_bytes"],
        "Ray": figures["ray_pss_bytes"],
        "a site's link": figures["site_pss_bytes"]["link"],
        "a site's trainer": figures["site_pss_bytes"]["trainer"],
        "everything": figures["all_pss_bytes"],
    }
    for what, nbytes in memory.items():
        table.add_row(f"{what}, idle MB", f"{nbytes / 1e6:.0f}")
    table.add_row("cores busy with other work", f"{figures['foreign_cores']:.2f}")
    Console().print(table)
    if figures["trainers_forked"]:
        Console().print("The trainers are forked from one process, so that they fit: see --help.")
