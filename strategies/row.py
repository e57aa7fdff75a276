"""A row: a paper's claim as a run that can fail, beside the method that it is about.

A row says what to run and what must come out; it runs nothing itself. ``benchmarks/evidence_seeds.py``
takes its arms through a real orchestrator and real site agents, one run of each arm a seed, and
asks `Row.holds` about the scores.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import strategies

Scores = Mapping[str, float]
"""Scores of one run by name ("test.accuracy", "test.ece", …), with "exchanges" and "wire_bytes"."""

Seed = Mapping[str, Scores]
"""Scores of one seed by arm."""


class Site(NamedTuple):
    """A data center of a row's federation.

    Attributes:
        name: As the arms' cohorts name it.
        settings: Settings of the row's task at this site.
    """

    name: str
    settings: Mapping[str, Any]


class Row(NamedTuple):
    """One claim, its control, and its bar.

    Attributes:
        number: Of the catalogue of methods.
        method: Name of the strategy.
        claim: One sentence: what the paper claims, qualitatively.
        control: What it is compared with.
        data: Tag of the data.
        task: Module of ``benchmarks/tasks`` whose task it runs.
        sites: The federation; arms choose their cohort from it.
        run: Keys that all arms' run files share.
        arms: For each arm the keys in which its run file differs.
        holds: From the scores of all seeds, what does not hold; empty if all does.
        reproduced: Whether the claim holds at this scale, as far as we have seen.
    """

    number: int
    method: str
    claim: str
    control: str
    data: str
    task: str
    sites: Sequence[Site]
    run: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    holds: Callable[[Sequence[Seed]], list[str]]
    reproduced: Literal["yes", "partly", "no"]

    def config(self, arm: str, seed: int) -> dict[str, Any]:
        """The run file of an arm: the common keys, its own laid over them, and the seed.

        The seed goes into ``seed`` and, so that each seed has its own division of the data, into
        the task's parameter ``seed``.
        """
        name = f"row-{self.number}-{arm}-seed-{seed}"
        out = merged(dict(self.run), self.arms[arm])
        return merged(out, {"name": name, "seed": seed, "task": {"params": {"seed": seed}}})


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``under``: tables are merged, everything else is replaced."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        out[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return out


def mean(seeds: Sequence[Seed], arm: str, score: str = "test.accuracy") -> float:
    """The mean of a score of an arm over the seeds."""
    return sum(seed[arm][score] for seed in seeds) / len(seeds)


def at_least(what: str, value: float, bar: float) -> list[str]:
    """Nothing if ``value >= bar``, else one line that says by how much it falls short."""
    return [] if value >= bar else [f"{what}: {value:.4g} < {bar:.4g}"]


def rows() -> dict[int, Row]:
    """Every ROW that stands beside a method, by its number."""
    found: dict[int, Row] = {}
    for folder in pkgutil.iter_modules(strategies.__path__, "strategies."):
        if not folder.ispkg:
            continue
        package = importlib.import_module(folder.name)
        for module in pkgutil.iter_modules(package.__path__, f"{folder.name}."):
            row = getattr(importlib.import_module(module.name), "ROW", None)
            if isinstance(row, Row):
                if row.number in found:
                    raise ValueError(f"two rows have the number {row.number}")
                found[row.number] = row
    return dict(sorted(found.items()))
