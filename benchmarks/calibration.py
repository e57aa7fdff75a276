"""Can the confidence be trusted? Losses, maps and sets, before and after, over five sites.

    python -m benchmarks.calibration [--seeds 6] [--splits 20] [--only fashion-3] [--keep FOLDER]

Digits with noise and Fashion-MNIST, five sites, IID and Dirichlet 0.5, through a real orchestrator
and real site agents. Two runs of each are trained: with cross-entropy and with ACLS. A map costs
nothing in training, so each is fitted in a run of one round that starts from the last model of the
first and takes a step of length zero; conformal sets so for ``--splits`` divisions of the held-out
pictures into validation and test, with the first seed.

What is measured is kept, a file for each workload and seed and for the sets of each workload, so that
a run can be cut off and gone on with. The bars are those of the issue, over the mean of the seeds. Writes its
part of docs/evidence.md and exits 1 if a bar falls short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence_seeds import EVIDENCE, written
from benchmarks.harness import Federation, RunResult

ROOT = Path(__file__).resolve().parents[1]
TASK = f"{ROOT / 'benchmarks/tasks/held_out.py'}:HeldOut"
SITES = tuple(f"site-{i}" for i in range(5))
ALPHA = 0.1
"""Sets may miss the right class so often."""
MARK, COST_MARK = 1002, 1003
"""Numbers of these parts' marks in docs/evidence.md; rows of the catalogue are below 1000."""

CE, ACLS = "cross-entropy", "acls"
MAPS = ("temperature", "vector_scaling", "histogram_binning", "isotonic")
SCORES = ("accuracy", "ece", "aece", "classwise_ece", "nll", "brier")


class Workload(NamedTuple):
    """Pictures, and what the task is told."""

    title: str
    params: Mapping[str, Any]


DIGITS = {"data": "digits", "train": 400, "held": 1397, "copies": 4}
"""Of 978 test pictures ECE would be 3 % where confidence is perfect; noise drawn anew makes more."""

WORKLOADS = {
    "noisy": Workload("digits, noise 0.35", {**DIGITS, "noise": 0.35}),
    "clear": Workload("digits, noise 0.15", {**DIGITS, "noise": 0.15}),
    "fashion": Workload("Fashion-MNIST", {"data": "fashion_mnist", "train": 2000, "held": 8000}),
}
SKEWS = {"IID": 0.0, "Dirichlet 0.5": 0.5}
ROUNDS, EPOCHS = 12, 5

Arm = dict[str, float]
"""Scores by name, of the test pictures; calibrated ones after the map."""
Seed = dict[str, dict[str, Arm]]
"""Arms by name, of each cell "workload, skew"."""
Sets = dict[str, list[Arm]]
"""Coverage by cell, one entry a split."""


def config(
    name: str,
    seed: int,
    workload: str,
    alpha: float,
    strategy: list[dict[str, Any]],
    start: str = "",
    draw: int = 0,
) -> dict[str, Any]:
    """A run file; with ``start`` one round that leaves that model as it is."""
    local: dict[str, Any] = {
        "work": {"epochs": EPOCHS},
        "batch_size": 32,
        "lr": 0.05,
        "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4},
    }
    if start:
        # A rate so small that fp32 weights stay what they are.
        local |= {"work": {"steps": 1}, "lr": 1e-30, "optimizer": {"name": "sgd", "momentum": 0.0}}
    rounds = 1 if start else ROUNDS
    out = {
        "name": f"{name}-{seed}-{draw}",
        "rounds": rounds,
        "seed": seed,
        "task": {
            "name": "held_out",
            "params": {**WORKLOADS[workload].params, "seed": seed, "alpha": alpha, "draw": draw},
        },
        "cohort": {"sites": list(SITES), "quorum": "all", "deadline_s": 600},
        "local": local,
        "assess": {"every": rounds},
        "strategy": strategy,
    }
    return {**out, "init": {"from": start}} if start else out


def arm(result: RunResult) -> Arm:
    """Scores of a run's last round: "ece", "calibrated ece", ….."""
    out = {}
    for score in SCORES:
        if f"test.{score}" in result.scores:
            out[score] = result.scores[f"test.{score}"]
        if f"test_calibrated.{score}" in result.scores:
            out[f"calibrated {score}"] = result.scores[f"test_calibrated.{score}"]
    return out


def trained(federation: Federation, workload: str, skew: str, seed: int, name: str) -> RunResult:
    """A run with cross-entropy, or with ACLS, and a temperature."""
    loss = [{"name": "acls"}] if name == ACLS else []
    strategy = [*loss, {"name": "temperature"}]
    stem = f"{workload}-{skew.split()[0].lower()}-{name}"
    return federation.run(config(stem, seed, workload, SKEWS[skew], strategy))


def behind(
    federation: Federation,
    workload: str,
    skew: str,
    seed: int,
    strategy: list[dict[str, Any]],
    draw: int = 0,
) -> RunResult:
    """What strategies make of the model that cross-entropy trained."""
    stem = f"{workload}-{skew.split()[0].lower()}"
    start = f"{stem}-{CE}-{seed}-0@{ROUNDS}"
    name = f"{stem}-{strategy[-1]['name']}"
    return federation.run(config(name, seed, workload, SKEWS[skew], strategy, start, draw))


def one_seed(federation: Federation, workload: str, seed: int) -> Seed:
    """All arms of a workload with one seed."""
    out: Seed = {}
    for skew in SKEWS:
        cell = {name: arm(trained(federation, workload, skew, seed, name)) for name in (CE, ACLS)}
        for name in MAPS[1:]:
            cell[name] = arm(behind(federation, workload, skew, seed, [{"name": name}]))
        out[f"{workload}, {skew}"] = {**cell, "temperature": cell[CE]}
        ce, calm = cell[CE], cell[ACLS]
        print(
            f"seed {seed} {workload}, {skew}: ECE {100 * ce['ece']:.2f} %, temperature "
            f"{100 * ce['calibrated ece']:.2f}, acls {100 * calm['ece']:.2f}; accuracy "
            f"{100 * ce['accuracy']:.2f}, acls {100 * calm['accuracy']:.2f}",
            flush=True,
        )
    return out


def sets_of(federation: Federation, workload: str, splits: int) -> Sets:
    """Coverage of the sets of a workload's first seed."""
    out: Sets = {}
    strategy = [{"name": "temperature"}, {"name": "conformal", "alpha": ALPHA}]
    for skew in SKEWS:
        trained(federation, workload, skew, 0, CE)
        found = out[f"{workload}, {skew}"] = []
        for draw in range(splits):
            result = behind(federation, workload, skew, 0, strategy, draw)
            sites = [s.scores["test.coverage"] for s in result.rounds[-1].sites]
            found.append(
                {
                    "pooled": result.scores["test.coverage"],
                    "size": result.scores["test.set_size"],
                    "lowest": min(sites),
                    "highest": max(sites),
                }
            )
        mean = statistics.fmean(c["pooled"] for c in found)
        print(f"sets of {workload}, {skew}: coverage {100 * mean:.2f} %", flush=True)
    return out


# -- bars ---------------------------------------------------------------------------------------


def mean(seeds: Sequence[Seed], cell: str, name: str, score: str) -> float:
    """The mean of a score over the seeds, in per cent."""
    return 100 * statistics.fmean(seed[cell][name][score] for seed in seeds)


def shortfalls(seeds: Sequence[Seed], sets: Sets) -> list[str]:
    """Which bars do not hold, cell by cell, over the mean of the seeds."""
    out = []
    for cell in seeds[0]:
        before, after = mean(seeds, cell, CE, "ece"), mean(seeds, cell, ACLS, "ece")
        lost = mean(seeds, cell, CE, "accuracy") - mean(seeds, cell, ACLS, "accuracy")
        if before >= 5 and after > 0.75 * before:
            out.append(f"{cell}: acls cuts ECE from {before:.2f} to {after:.2f}, the bar is 25 %")
        if before < 5 and after > before + 1:
            out.append(f"{cell}: acls raises ECE from {before:.2f} to {after:.2f}, the bar is 1")
        if lost > 2.5:
            out.append(f"{cell}: acls costs {lost:.2f} points of accuracy, the bar is 2.5")
        calibrated = mean(seeds, cell, CE, "calibrated ece")
        if before >= 5 and calibrated > 0.5 * before:
            out.append(
                f"{cell}: temperature cuts ECE from {before:.2f} to {calibrated:.2f}, the bar is 50 %"
            )
        if calibrated > before + 0.3:
            out.append(
                f"{cell}: temperature raises ECE from {before:.2f} to {calibrated:.2f}, the bar is 0.3"
            )
        if any(s[cell][CE]["accuracy"] != s[cell][CE]["calibrated accuracy"] for s in seeds):
            out.append(f"{cell}: temperature changed the accuracy")
        covered = [c["pooled"] for c in sets.get(cell, [])]
        if covered and abs(statistics.fmean(covered) - (1 - ALPHA)) > 0.01:
            found = 100 * statistics.fmean(covered)
            out.append(f"{cell}: coverage {found:.2f} %, the bar is {100 * (1 - ALPHA):g} ± 1")
    return out


# -- the tables -----------------------------------------------------------------------------------


def part(seeds: Sequence[Seed], sets: Sets, short: Sequence[str]) -> str:
    """The part of docs/evidence.md."""
    lines = [
        "## Calibration of every round",
        "",
        (
            f"`python -m benchmarks.calibration --seeds {len(seeds)}`: {len(seeds)} seeds, "
            f"{len(SITES)} sites, MLP with two hidden layers of 128, FedAvg, {ROUNDS} rounds of {EPOCHS} "
            "local epochs, SGD with momentum 0.9, weight decay 5e-4, batch 32; digits: 400 pictures to "
            "train on, 419 of validation and 978 of test, these two each four times with noise of their "
            "own; Fashion-MNIST: 2,000, 2,400, 5,600. Each site's three sets have its own mixture of "
            "classes. Test data of all sites, in per cent, mean ± standard deviation over the seeds. Maps "
            "are fitted to the model of the arm cross-entropy."
        ),
        "",
        "| data | arm | accuracy | ECE | AECE | class-wise ECE | NLL |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in seeds[0]:
        for name in (CE, ACLS, *MAPS):
            after = "calibrated " if name in MAPS else ""
            cells = [
                _spread(seeds, cell, name, after + score, 100)
                for score in ("accuracy", "ece", "aece", "classwise_ece")
            ]
            cells.append(_spread(seeds, cell, name, after + "nll", 1, 3))
            lines.append(f"| {titled(cell)} | {name} | " + " | ".join(cells) + " |")
    lines += ["", *coverage(sets)]
    lines += ["", "All bars hold." if not short else "Fell short: " + "; ".join(short) + "."]
    return "\n".join(lines)


def coverage(sets: Sets) -> list[str]:
    """The table of conformal sets."""
    lines = [
        (
            f"Conformal sets (lac, {100 * (1 - ALPHA):g} % asked for) behind the temperature, seed 0, "
            "over divisions of the held-out pictures into validation and test; coverage of test pictures in "
            "per cent, mean ± standard deviation; lowest and highest of the five sites, means:"
        ),
        "",
        "| data | splits | coverage | lowest site | highest site | classes in a set |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell, found in sets.items():
        pooled = [100 * c["pooled"] for c in found]
        low, high, size = (
            statistics.fmean(c[k] for c in found) for k in ("lowest", "highest", "size")
        )
        lines.append(
            f"| {titled(cell)} | {len(found)} | {statistics.fmean(pooled):.2f} ± {_deviation(pooled):.2f} "
            f"| {100 * low:.1f} | {100 * high:.1f} | {size:.2f} |"
        )
    return lines


def titled(cell: str) -> str:
    """A cell in words."""
    workload, skew = cell.split(", ")
    return f"{WORKLOADS[workload].title}, {skew}"


def _spread(
    seeds: Sequence[Seed], cell: str, name: str, score: str, scale: float, digits: int = 2
) -> str:
    values = [scale * seed[cell][name][score] for seed in seeds]
    return f"{statistics.fmean(values):.{digits}f} ± {_deviation(values):.{digits}f}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


# -- running --------------------------------------------------------------------------------------


def kept(folder: Path, name: str, measure: Callable[[], Any]) -> Any:
    """What was measured before, or is now."""
    path = folder / f"{name}.json"
    if not path.exists():
        document = measure()
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1))
    return json.loads(path.read_text())


def federation() -> Federation:
    """Five sites on this machine."""
    settings = {site: {"part": i, "parts": len(SITES)} for i, site in enumerate(SITES)}
    return Federation(SITES, {"held_out": TASK}, settings)


def measured(name: str, splits: int) -> Any:
    """What "fashion-3" or "sets-fashion" asks for, in a federation of its own."""
    what, _, which = name.partition("-")
    with federation() as there:
        if what == "sets":
            return sets_of(there, which, splits)
        return one_seed(there, what, int(which))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(prog="calibration", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--splits", type=int, default=20, help="of the first seed, for sets")
    parser.add_argument("--only", help="measure noisy-0, … or sets-noisy, …, and write no table")
    parser.add_argument("--kept", action="store_true", help="tables of what is kept, no runs")
    parser.add_argument("--keep", type=Path, default=ROOT / "build/calibration")
    parser.add_argument("--out", type=Path, default=EVIDENCE, help="where the tables go")
    options = parser.parse_args(arguments)

    def found(name: str) -> Any:
        return kept(options.keep, name, lambda: measured(name, options.splits))

    if options.only:
        found(options.only)
        return 0

    def wanted(*names: str) -> bool:
        return not options.kept or all((options.keep / f"{n}.json").exists() for n in names)

    seeds: list[Seed] = []
    sets: Sets = {}
    for seed in range(options.seeds):
        names = [f"{workload}-{seed}" for workload in WORKLOADS]
        if wanted(*names):
            seeds.append({cell: arms for name in names for cell, arms in found(name).items()})
    for workload in WORKLOADS:
        if wanted(f"sets-{workload}"):
            sets |= found(f"sets-{workload}")
    if not seeds:
        raise SystemExit("calibration: no seed has been measured yet; leave out --kept")
    short = shortfalls(seeds, sets)
    text = part(seeds, sets, short)
    document = options.out.read_text() if options.out.exists() else "# Evidence\n"
    options.out.write_text(written(document, MARK, text))
    print(f"\n{text}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
