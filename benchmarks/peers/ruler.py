"""The same ruler for every peer: its processes under the sampler, its rounds by their beginnings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.peers.case import Case, Figures
from benchmarks.peers.deployment import Deployment
from orchestrator.bench.sampler import Group, Sampler
from protos.errors import ComputeFailed, DataCorrupt

SERVER = "server"
RUN_S = 1800.0
TOLERANCE = 1e-5
"""Of one value after one round: a hundred roundings of float32 near 1."""


def measure(
    deployment: Deployment, case: Case, notes: Path, launch: Callable[[], object]
) -> Figures:
    """Launch, wait for all rounds, and take the figures.

    Args:
        deployment: `SERVER` and the sites, started.
        case: What is asked.
        notes: File in which the peer's program notes its rounds; see `beginnings`.
        launch: Starts the rounds.
    """
    notes.touch()
    groups = {name: Group([pid]) for name, pid in deployment.pids.items()}
    what = f"{case.rounds} rounds of {case.model_bytes / 1e6:g} MB"
    with Sampler(groups) as sampler:
        launch()
        deployment.until(lambda: len(_told(notes.read_text())) > case.rounds, what, RUN_S)
    return _figures(sampler, beginnings(notes.read_text(), case.rounds, case.step))


def _figures(sampler: Sampler, beginnings: Sequence[float]) -> Figures:
    """The figures of a peer, whose groups are `SERVER` and its sites.

    Args:
        sampler: After its end.
        beginnings: When each round began, and when one more would have.
    """
    spans = list(pairwise(beginnings[1:]))
    return Figures(
        wall_s=[end - start for start, end in spans],
        cpu_s=[sampler.cpu_s(start, end) for start, end in spans],
        foreign_cores=median(sampler.foreign_cores(start, end) for start, end in spans),
        server_peak_rss_bytes=sampler.peak_rss_bytes(SERVER),
        ray_peak_rss_bytes=0,
        site_peak_rss_bytes=max(
            sampler.peak_rss_bytes(name) for name in sampler.groups if name != SERVER
        ),
    )


def beginnings(text: str, rounds: int, step: float) -> list[float]:
    """When each round began, and when one more would have; checks that the weights were averaged.

    Args:
        text: What a peer's program noted: lines of JSON with ``round`` (from any number on), ``at``
            (seconds since the epoch) and ``value``, one of the model's values at that moment. Of
            several lines about one round the earliest counts.
        rounds: Rounds that were asked for.
        step: By how much the average rises in a round.

    Raises:
        ComputeFailed: Fewer rounds are told of.
        DataCorrupt: A round did not make of the model what the sites did.
    """
    told = _told(text)
    notes = [told[number] for number in sorted(told)][: rounds + 1]
    if len(notes) <= rounds:
        raise ComputeFailed(f"{len(notes)} beginnings of rounds instead of {rounds + 1}")
    for before, after in pairwise(notes):
        rise = after["value"] - before["value"]
        if not abs(rise - step) < TOLERANCE:
            raise DataCorrupt(
                f"in round {before['round']:g} a value of the model rose by {rise:g}; the mean of"
                f" what the sites added is {step:g}"
            )
    return [note["at"] for note in notes]


def _told(text: str) -> dict[int, Mapping[str, float]]:
    told: dict[int, Mapping[str, float]] = {}
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break  # is being written just now
        note = json.loads(line)
        known = told.setdefault(note["round"], note)
        if note["at"] < known["at"]:
            told[note["round"]] = note
    return told
