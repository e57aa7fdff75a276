"""`farflung bench exchange`: what it costs to bring weights to all sites and back.

Everything is as it is in use: real processes, mutual TLS, spool, outbox, base cache, fsync and
signatures. Only the training is left out: each site adds a constant of its own.

The figures are medians over the rounds but the first:

    wall_s_per_round        from the beginning of one round to the beginning of the next
    cpu_s_per_round         user and system time of daemon, Ray, links and trainers together
    wire_bytes_per_round    payload over the wire, both ways

Peaks are over the whole run, and resident memory of a process tree is the sum over its processes,
so that a page which several share counts in each. Ray's figure is that of the compute process with
everything below it; gateways, if there are any, are counted with the daemon that starts them.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from orchestrator.bench.floor import Floor, measure_floor
from orchestrator.bench.sampler import Group
from orchestrator.bench.trial import COMPUTE, Trial, machine, run_trial, site_names
from orchestrator.federation import Federation
from protos.chunks import write_durably


def run_exchange(
    sites: int, model_bytes: int, rounds: int, file: Path | None, gateways: int = 0
) -> dict[str, Any]:
    """Measure, print, and write the figures into a file.

    Args:
        sites: Site agents.
        model_bytes: Size of the model.
        rounds: At least 2; the first is left out of the medians.
        file: JSON file to write, if any.
        gateways: Processes that carry the weights; 0: the daemon does.
    """
    out = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="farflung-exchange-") as folder:
        out.print(f"{sites} sites, {model_bytes / 1e6:g} MB, {rounds} rounds: starting …")
        figures = measure_exchange(Path(folder), sites, model_bytes, rounds, gateways)
    out.print("The same bytes over bare gRPC with TLS …")
    # What a site really fetched and sent, so that both carry the same.
    each_way = round(figures["wire_bytes_per_round"] / (2 * sites))
    figures |= _floor_figures(measure_floor(sites, each_way, rounds))
    if file is not None:
        write_durably(file.absolute(), (json.dumps(figures, indent=2) + "\n").encode())
    _print(figures)
    return figures


def measure_exchange(
    folder: Path, sites: int, model_bytes: int, rounds: int, gateways: int = 0
) -> dict[str, Any]:
    """The figures of this system alone; see the module's page."""
    names = site_names(sites)

    def grouping(federation: Federation) -> dict[str, Group]:
        agents = federation.agents()
        return {
            "daemon": Group([federation.daemon.pid], apart=[COMPUTE]),
            "ray": Group([federation.daemon.pid], only=[COMPUTE]),
            **{name: Group([agents[name].pid]) for name in names},
        }

    trial = run_trial(folder, sites, model_bytes, rounds, grouping, 0.05, gateways=gateways)
    sampler, cpu_s = trial.sampler, [trial.sampler.cpu_s(*span) for span in trial.spans]
    return {
        "sites": sites,
        "gateways": gateways,
        "model_bytes": trial.model_bytes,
        "rounds": rounds,
        "wall_s_per_round": median(trial.wall_s),
        "cpu_s_per_round": median(cpu_s),
        "cpu_s_by_group": _by_group(trial, names),
        "daemon_peak_rss_bytes": sampler.peak_rss_bytes("daemon"),
        "ray_peak_rss_bytes": sampler.peak_rss_bytes("ray"),
        "site_peak_rss_bytes": max(sampler.peak_rss_bytes(name) for name in names),
        "wire_bytes_per_round": median(entry.wire_bytes for entry in trial.rounds),
        "foreign_cores": median(sampler.foreign_cores(*span) for span in trial.spans),
        "wall_s": trial.wall_s,
        "cpu_s": cpu_s,
        "seconds_by_phase": trial.seconds_by_phase,
        "machine": machine(),
    }


def _by_group(trial: Trial, names: list[str]) -> dict[str, float]:
    def typical(group: str) -> float:
        return median(trial.sampler.cpu_s(start, end, group) for start, end in trial.spans)

    out = {group: typical(group) for group in ("daemon", "ray")}
    return out | {"sites": sum(typical(name) for name in names)}


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
