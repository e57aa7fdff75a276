"""What is distillation at the orchestrator worth, and what does it cost?

    python -m benchmarks.distillation [--seeds 6] [--tasks digits,fashion_mnist=3] [--keep FILE]
                                      [--only "feddf, as published"]

Five sites with label skew (Dirichlet 0.1), through a real orchestrator and real site agents: the
plain average with a student distilled beside it, and FedDF with each kind of teachers' weights and
with generated inputs, all at equal rounds and equal local work. Seconds of a round are those of the
plug-ins' own processes, wall and CPU, with their start. Writes its part of docs/evidence.md and
exits 1 if a bar falls short. With ``--keep`` every run's outcome is written down as soon as it is
there, and is not run again: what was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence_seeds import EVIDENCE, written
from benchmarks.harness import Federation, RunResult
from protos.digest import canonical

ROOT = Path(__file__).resolve().parents[1]
SITES = ("north", "south", "east", "west", "centre")
ROUNDS, EPOCHS, BATCH, ALPHA = 5, 10, 32, 0.1
MARK = "row 1004"
"""Mark of this part in docs/evidence.md; rows of the catalogue are below 1000."""


class Workload(NamedTuple):
    """A task of deploy/examples, and how it is trained."""

    source: str
    title: str
    params: Mapping[str, Any]
    lr: float


WORKLOADS = {
    "digits": Workload(
        f"{ROOT / 'deploy/examples/images.py'}:Digits",
        "digits, MLP 64-64-10, student 64-15-10 (24 % of the parameters), 400 proxy pictures",
        {"hidden": [64], "student_hidden": [15], "proxy": 400},
        0.05,
    ),
    "fashion_mnist": Workload(
        f"{ROOT / 'deploy/examples/images.py'}:FashionMnist",
        "Fashion-MNIST, 3,000 pictures at the sites, two convolutions of 16 channels, student of 4 "
        "(21 % of the parameters), 2,000 proxy pictures",
        {"subset": 5000, "proxy": 2000},
        0.05,
    ),
}

PLAIN, STUDENT = "average", "student"
FEDDF = {"name": "feddf"}
ARMS: dict[str, list[dict[str, Any]]] = {
    PLAIN: [{"name": "student"}],  # which leaves the average as it is
    "feddf": [FEDDF],
    "feddf, as published": [{**FEDDF, "teacher": "uniform", "balance": False}],
    "feddf, by calibration": [{**FEDDF, "teacher": "calibration"}],
    "feddf, generated": [{**FEDDF, "proxy": "generated", "samples": 500}],
}
GAIN, LOSS, SHARE = 1.0, 1.0, 0.25
"""Points that FedDF has to gain, that the student may lose, and the student's largest share."""


class Outcome(NamedTuple):
    """One arm of one seed.

    Attributes:
        accuracy: Of the global model on the test pictures after the last round, per cent.
        ece: Its expected calibration error, per cent.
        report: What the arm's plug-in reports of the last round.
        wall: Seconds of the plug-in a round, mean.
        cpu: Its CPU seconds a round, mean.
    """

    accuracy: float
    ece: float
    report: Mapping[str, float]
    wall: float
    cpu: float


Seed = Mapping[str, Outcome]
"""Outcomes by arm."""


def config(task: str, arm: str, seed: int, rounds: int) -> dict[str, Any]:
    """A run file."""
    work = WORKLOADS[task]
    return {
        "name": f"{task}-{arm.replace(' ', '-').replace(',', '')}-{seed}",
        "rounds": rounds,
        "seed": seed,
        "task": {"name": task, "params": {**work.params, "alpha": ALPHA, "split_seed": seed}},
        "cohort": {"sites": list(SITES), "quorum": "all", "deadline_s": 600},
        "local": {
            "work": {"epochs": EPOCHS},
            "batch_size": BATCH,
            "lr": work.lr,
            "optimizer": {"name": "sgd", "momentum": 0.9},
        },
        "assess": {"every": rounds},
        "strategy": ARMS[arm],
    }


def outcome(result: RunResult, arm: str) -> Outcome:
    """What counts of a run.

    Raises:
        RuntimeError: The plug-in was skipped in a round; says why.
    """
    name = ARMS[arm][0]["name"]
    plugins = [next(p for p in r.plugins if p.name == name) for r in result.rounds]
    for plugin in plugins:
        if plugin.state != "done":
            raise RuntimeError(f"{arm}: {plugin.name} was {plugin.state}: {plugin.reason}")
    return Outcome(
        100 * result.scores["test.accuracy"],
        100 * result.scores["test.ece"],
        plugins[-1].report,
        statistics.fmean(p.seconds or 0.0 for p in plugins),
        statistics.fmean(p.cpu_seconds or 0.0 for p in plugins),
    )


class Kept:
    """Outcomes that are there already: a line of JSON each.

    Args:
        path: The file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        rows = [json.loads(line) for line in lines]
        self._found = {canonical(row["run"]): Outcome(*row["outcome"]) for row in rows}

    def outcome(
        self, federation: Federation, task: str, arm: str, seed: int, rounds: int
    ) -> Outcome:
        """Of a run: from the file, or by running it."""
        run = config(task, arm, seed, rounds)
        found = self._found.get(canonical(run))
        if found is None:
            found = outcome(federation.run(run), arm)
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps({"run": run, "outcome": list(found)}) + "\n")
        return found


def one_seed(
    federation: Federation, task: str, seed: int, rounds: int, kept: Kept, arms: Sequence[str]
) -> Seed:
    """Some arms with one seed."""
    out = {}
    for arm in arms:
        out[arm] = found = kept.outcome(federation, task, arm, seed, rounds)
        own = found.report.get("accuracy")
        beside = "" if own is None else f", student {100 * own:.2f} %"
        print(
            f"{task} seed {seed} {arm}: {found.accuracy:.2f} %{beside}, "
            f"{found.wall:.1f} s a round, CPU {found.cpu:.1f} s",
            flush=True,
        )
    return out


def gains(seeds: Sequence[Seed], arm: str) -> list[float]:
    """Points above the plain average, seed by seed."""
    return [seed[arm].accuracy - seed[PLAIN].accuracy for seed in seeds]


def student_losses(seeds: Sequence[Seed]) -> list[float]:
    """Points that the student is below the average, seed by seed."""
    return [100 * seed[PLAIN].report["accuracy_lost"] for seed in seeds]


def shortfalls(task: str, seeds: Sequence[Seed]) -> list[str]:
    """Which bars do not hold."""
    out = []
    gained = statistics.fmean(gains(seeds, "feddf"))
    if gained < GAIN:
        out.append(f"{task}: FedDF gains {gained:.2f} points, the bar is {GAIN:g}")
    lost = statistics.fmean(student_losses(seeds))
    if lost > LOSS:
        out.append(f"{task}: the student loses {lost:.2f} points, the bar is {LOSS:g}")
    share = max(seed[PLAIN].report["share"] for seed in seeds)
    if share > SHARE:
        out.append(f"{task}: the student has {100 * share:.0f} % of the parameters")
    return out


def part(measured: Mapping[str, Sequence[Seed]], short: Sequence[str], rounds: int) -> str:
    """The part of docs/evidence.md."""
    lines = [
        "## Distillation at the orchestrator",
        "",
        (
            f"`python -m benchmarks.distillation`: {len(SITES)} sites, label skew by Dirichlet "
            f"{ALPHA:g}, {rounds} rounds of {EPOCHS} local epochs, batch {BATCH}, SGD with momentum "
            "0.9, strategies with their defaults but for what an arm's name says; test accuracy and "
            "ECE in per cent after the last round, mean ± standard deviation over the seeds, and "
            "the paired difference to the plain average with its standard error. "
            "Seconds are those of the plug-in's own process in a round, with its start."
        ),
    ]
    for task, seeds in measured.items():
        lines += [
            "",
            f"{WORKLOADS[task].title}; seeds 0 to {len(seeds) - 1}:",
            "",
            "| arm | accuracy | ECE | over the average | seconds a round | CPU seconds |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for arm in seeds[0]:
            costs = [
                statistics.fmean(getattr(s[arm], key) for s in seeds) for key in ("wall", "cpu")
            ]
            cost = "– | –" if arm == PLAIN else f"{costs[0]:.1f} | {costs[1]:.1f}"
            lines.append(
                f"| {arm} | {_spread([s[arm].accuracy for s in seeds])} "
                f"| {_spread([s[arm].ece for s in seeds])} "
                f"| {'–' if arm == PLAIN else _paired(gains(seeds, arm))} | {cost} |"
            )
            if arm == PLAIN:
                own = [100 * s[arm].report["accuracy"] for s in seeds]
                ece = [100 * s[arm].report["ece"] for s in seeds]
                lost = [-x for x in student_losses(seeds)]
                lines.append(
                    f"| its student | {_spread(own)} | {_spread(ece)} | {_paired(lost)} "
                    f"| {costs[0]:.1f} | {costs[1]:.1f} |"
                )
    lines += ["", "All bars hold." if not short else "Fell short: " + "; ".join(short) + "."]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


def _paired(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):+.2f} ± {spread / len(values) ** 0.5:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(
        prog="distillation", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--tasks", default=",".join(WORKLOADS), help="TASK or TASK=SEEDS, of digits, fashion_mnist"
    )
    parser.add_argument("--out", type=Path, default=EVIDENCE, help="where the tables go")
    parser.add_argument(
        "--keep", type=Path, help="a file of outcomes: those in it are not run again"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="ARM", help="beside average and feddf"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.only) - set(ARMS):
        parser.error(f"there is no arm {unknown.pop()!r}; there are {sorted(ARMS)}")
    arms = [a for a in ARMS if not options.only or a in (PLAIN, "feddf", *options.only)]
    kept = Kept(options.keep)
    asked = [task.partition("=") for task in options.tasks.split(",")]
    tasks = {task: int(seeds or options.seeds) for task, _, seeds in asked}
    if unknown := set(tasks) - set(WORKLOADS):
        parser.error(f"there is no task {unknown.pop()!r}; there are {sorted(WORKLOADS)}")
    settings = {site: {"part": i, "parts": len(SITES)} for i, site in enumerate(SITES)}
    sources = {task: WORKLOADS[task].source for task in tasks}
    allowed = {"side_payloads": ["sum", "mean by count", "keep per site"]}
    with Federation(SITES, sources, settings, policy=allowed) as federation:
        measured = {
            task: [one_seed(federation, task, s, options.rounds, kept, arms) for s in range(seeds)]
            for task, seeds in tasks.items()
        }
    short = [line for task, seeds in measured.items() for line in shortfalls(task, seeds)]
    document = options.out.read_text() if options.out.exists() else "# Evidence\n"
    text = part(measured, short, options.rounds)
    options.out.write_text(written(document, MARK, text))
    print(f"\n{text}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
