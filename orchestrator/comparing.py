"""Runs beside each other: means over seeds with their intervals, and differences seed by seed.

Runs whose configurations differ in nothing but name and seed are one *arm*. An interval is the
bootstrap's (Efron 1979): the seeds are drawn again with replacement, `DRAWS` times, and of the means
the middle `LEVEL` is taken. Differences are taken within a seed, where both arms have the same
data, division and first weights, and only then averaged: what the seeds have in common cancels.

With few seeds these intervals are too narrow (for five normal values one of 95 % holds the mean about
84 % of the time), and one seed has none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any, NamedTuple

from orchestrator.views import Round, Run, View
from protos.digest import canonical
from protos.errors import InvalidInput, NotFound

DRAWS = 10_000
LEVEL = 0.95
FEW = 6
"""Below this many seeds an interval is said to be too narrow."""

SCORES = {
    "accuracy": ("test.accuracy", "val.accuracy"),
    "nll": ("test.nll", "val.nll"),
    "ece": ("test.ece", "val.ece"),
    "ece calibrated": ("test_calibrated.ece", "val_calibrated.ece"),
    "coverage": ("test.coverage", "val.coverage"),
}
"""What is compared, and where it is looked for: on test data, else on validation data."""


class Estimate(View):
    """A mean over seeds.

    Attributes:
        mean: Of the values.
        low: Lower end of the interval; None for one seed.
        high: Upper end.
        seeds: How many values there are.
    """

    mean: float
    low: float | None
    high: float | None
    seeds: int


class Arm(View):
    """Runs that differ in nothing but name and seed.

    Attributes:
        name: What the names of its runs have in common.
        differs: The keys of the configuration in which the arms differ, with this arm's values.
        runs: Name of the run by seed.
        values: By score and seed.
        scores: Means of them.
        against: Means of the paired differences, this arm minus the first one; empty for that.
    """

    name: str
    differs: dict[str, Any]
    runs: dict[int, str]
    values: dict[str, dict[int, float]]
    scores: dict[str, Estimate]
    against: dict[str, Estimate]


class Comparison(View):
    """Arms, the first of which is the one that the others are compared with.

    Attributes:
        level: Of the intervals.
        arms: In the order in which the runs were named.
    """

    level: float
    arms: tuple[Arm, ...]


class Scored(NamedTuple):
    """A run and the round whose scores stand for it."""

    run: Run
    scores: Mapping[str, float]


def chosen(words: Sequence[str], known: Sequence[Run]) -> list[Run]:
    """The runs that are meant, in the order of the words, each once.

    Args:
        words: Names, ids, or patterns such as ``feddf-*``.
        known: All runs, newest last. Of runs of one name that a plain name means the newest counts;
            a pattern means all that match.

    Raises:
        NotFound: A word that no run matches.
    """
    out: dict[str, Run] = {}
    for word in words:
        same = [run for run in known if word in (run.id, run.name)][-1:]
        for run in same or [run for run in known if fnmatchcase(run.name, word)]:
            out.setdefault(run.id, run)
        if not same and not any(fnmatchcase(run.name, word) for run in known):
            raise NotFound(f"run: there is no {word}", run=word)
    return list(out.values())


def scored(run: Run, rounds: Sequence[Round], best: bool = False) -> Scored:
    """A run with the scores of its last assessed round, or of the best one.

    Raises:
        InvalidInput: No round of it was assessed.
    """
    assessed = [r for r in rounds if r.state == "committed" and r.assessed]
    if best:
        assessed = [r for r in assessed if r.round == run.best] or assessed
    if not assessed:
        raise InvalidInput(
            f"run {run.name}: no round of it was assessed, so there is nothing to compare",
            run=run.name,
        )
    return Scored(run, assessed[-1].scores)


def compare(entries: Sequence[Scored]) -> Comparison:
    """The arms of some runs. Of runs with the same configuration and seed the newest counts."""
    groups: dict[bytes, dict[int, Scored]] = {}
    configs: dict[bytes, dict[str, Any]] = {}
    for entry in entries:
        config = _without_seed(entry.run.config)
        key = canonical(config)
        configs.setdefault(key, config)
        seed = int(entry.run.config.get("seed", 0))
        own = groups.setdefault(key, {})
        if seed not in own or own[seed].run.created <= entry.run.created:
            own[seed] = entry
    flat = {key: dict(_flat(config)) for key, config in configs.items()}
    keys = sorted({name for own in flat.values() for name in own})
    differing = [k for k in keys if len({canonical(own.get(k)) for own in flat.values()}) > 1]
    names = _names([[e.run.name for e in own.values()] for own in groups.values()])
    arms: list[Arm] = []
    for name, (key, own) in zip(names, groups.items(), strict=True):
        seeds = dict(sorted(own.items()))
        values = {
            score: {
                seed: v for seed, e in seeds.items() if (v := _found(score, e.scores)) is not None
            }
            for score in SCORES
        }
        values = {score: by_seed for score, by_seed in values.items() if by_seed}
        arms.append(
            Arm(
                name=name,
                differs={k: flat[key].get(k) for k in differing},
                runs={seed: e.run.name for seed, e in seeds.items()},
                values=values,
                scores={s: estimate(list(v.values())) for s, v in values.items()},
                against=_paired(values, arms[0].values) if arms else {},
            )
        )
    return Comparison(level=LEVEL, arms=tuple(arms))


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value, with its bootstrap interval; the same each time."""
    import numpy as np

    sample = np.asarray(values, dtype=np.float64)
    mean, n = float(sample.mean()), len(sample)
    if n == 1:
        return Estimate(mean=mean, low=None, high=None, seeds=1)
    drawn = sample[np.random.default_rng(0).integers(0, n, size=(DRAWS, n))].mean(axis=1)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean=mean, low=float(low), high=float(high), seeds=n)


def _paired(
    own: Mapping[str, Mapping[int, float]], first: Mapping[str, Mapping[int, float]]
) -> dict[str, Estimate]:
    out = {}
    for score, values in own.items():
        other = first.get(score, {})
        pairs = [value - other[seed] for seed, value in values.items() if seed in other]
        if pairs:
            out[score] = estimate(pairs)
    return out


def _found(score: str, scores: Mapping[str, float]) -> float | None:
    return next((scores[name] for name in SCORES[score] if name in scores), None)


def _without_seed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration but for name, seed, the task's own ``seed``, and what nothing depends on."""
    out = {k: v for k, v in config.items() if k not in ("name", "seed", "references")}
    task = dict(out.get("task") or {})
    task["params"] = {k: v for k, v in (task.get("params") or {}).items() if k != "seed"}
    return {**out, "task": task}


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """The leaves of tables by their path; lists are leaves, but strategies go by their names."""
    if path == "strategy":
        entries = {
            entry["name"]: {k: v for k, v in entry.items() if k != "name"} for entry in value
        }
        return [("strategy", list(entries)), *_flat(entries, "strategy.")]
    if not isinstance(value, Mapping):
        return [(path.rstrip("."), value)]
    dot = f"{path}." if path and not path.endswith(".") else path
    return [leaf for k, v in value.items() for leaf in _flat(v, dot + k)]


def _names(groups: Sequence[Sequence[str]]) -> list[str]:
    """What each group's names begin with, less a seed's part; the first name where that is shared."""
    begun = []
    for names in groups:
        same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
        shared = names[0] if len(names) == 1 else "".join(letters[0] for letters in same)
        begun.append(re.sub(r"[-_. ]+(seed|s)?[-_. ]*$", "", shared) or names[0])
    return [
        name if begun.count(name) == 1 else names[0]
        for name, names in zip(begun, groups, strict=True)
    ]
