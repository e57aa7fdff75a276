"""A row: a paper's claim as a run that can fail, beside the method that it is about.

A row says what to run and what must come out; it runs nothing itself. ``benchmarks/evidence_seeds.py``
takes its arms through a real orchestrator and real site agents, one run of each arm a seed, and
asks `Row.holds` about the scores.
"""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import strategies
from protos.digest import canonical, digest

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
        beside: Controls that are no federated runs: arms that ``controls(seed)`` of the task's
            module gives scores of.
        scores: Further scores that the table shows; those of plug-ins are "strategy.key".
        policy: Keys of [policy] at all sites.
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
    beside: Sequence[str] = ()
    scores: Sequence[str] = ()
    policy: Mapping[str, Any] = MappingProxyType({})

    @property
    def digest(self) -> str:
        """Of what is run: figures that were measured with another one are of another row."""
        document = {**self._asdict(), "holds": None, "claim": None, "reproduced": None}
        document["sites"] = [[site.name, dict(site.settings)] for site in self.sites]
        document["policy"] = dict(self.policy)
        for name in ("beside", "scores", "policy"):  # rows without them keep their digest
            if not document[name]:
                del document[name]
        return digest(canonical(document))

    def config(self, arm: str, seed: int) -> dict[str, Any]:
        """The run file of an arm: the common keys, its own laid over them, and the seed.

        The seed goes into ``seed`` and, so that each seed has its own division of the data, into
        the task's parameter ``seed``.
        """
        name = f"row-{self.number}-{arm}-seed-{seed}"
        out = merged(dict(self.run), self.arms[arm])
        return merged(out, {"name": name, "seed": seed, "task": {"params": {"seed": seed}}})


FIGURES = Path(strategies.__file__).parent / "measured"
"""A file for each row that was run, ``NUMBER.json``; `Measured` says what is in it."""


class Measured(NamedTuple):
    """What a row came to when it was last run.

    Attributes:
        digest: Of the row that was run.
        seeds: How many.
        arms: For each arm the mean and the standard deviation over the seeds, by score.
        short: What did not hold.
    """

    digest: str
    seeds: int
    arms: Mapping[str, Mapping[str, tuple[float, float]]]
    short: Sequence[str]

    @classmethod
    def of(cls, row: Row, seeds: Sequence[Seed], short: Sequence[str]) -> Measured:
        """The figures of a run of all seeds."""
        arms: dict[str, dict[str, tuple[float, float]]] = {}
        for arm in row.arms:
            names = set[str].intersection(*(set(seed[arm]) for seed in seeds))
            values = {name: [seed[arm][name] for seed in seeds] for name in sorted(names)}
            arms[arm] = {
                name: (fmean(v), stdev(v) if len(v) > 1 else 0.0)
                for name, v in values.items()
                if name.startswith(("test", "val"))
            }
        return cls(row.digest, len(seeds), arms, tuple(short))

    def write(self, number: int, folder: Path) -> None:
        """Into the file of a row."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._asdict(), indent=1)
        (folder / f"{number}.json").write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, row: Row, folder: Path = FIGURES) -> Measured | None:
        """The figures of a row; None if there are none, or if they are of a row since changed."""
        try:
            found = cls(**json.loads((folder / f"{row.number}.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        return found if found.digest == row.digest else None


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid over ``under``: tables are merged, everything else is replaced."""
    out = dict(under)
    for key, value in over.items():
        below = out.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        out[key] = merged(below, value) if both else value  # type: ignore[arg-type]
    return out


def mean(seeds: Sequence[Seed], arm: str, score: str = "test.accuracy") -> float:
    """The mean of a score of an arm over the seeds; NaN, which meets no bar, where one lacks it."""
    return sum(seed[arm].get(score, math.nan) for seed in seeds) / len(seeds)


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
