"""What do codecs cost in accuracy? Each against fp32, with and without error feedback.

    python -m benchmarks.compression [--seeds 6] [--tasks digits,fashion_mnist]

scikit-learn's digits and a subset of Fashion-MNIST, three sites, one local epoch a round, through a
real orchestrator and real site agents, all arms at equal rounds and equal work. Bytes are those that
the sites send in a round. The bars are those of the issue, over the mean of
the seeds; the arms without feedback stand beside them without a bar. Writes its part of
docs/evidence.md and exits 1 if a bar falls short.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evidence_seeds import EVIDENCE, written
from benchmarks.harness import Federation, RunResult

ROOT = Path(__file__).resolve().parents[1]
SITES = ("north", "south", "east")
ROUNDS, BATCH = 100, 32
MARK = "row 1001"
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
        "digits, MLP 64-64-10",
        {"hidden": [64], "val_fraction": 0.05},
        0.1,
    ),
    "fashion_mnist": Workload(
        f"{ROOT / 'deploy/examples/images.py'}:FashionMnist",
        "Fashion-MNIST, 3,000 pictures, two convolutions",
        {"subset": 3000, "val_fraction": 0.05},
        0.05,
    ),
}

PLAIN = "fp32"
ARMS: dict[str, list[dict[str, Any]]] = {
    PLAIN: [],
    "int8": [{"name": "int8"}],
    "int8, no feedback": [{"name": "int8", "error_feedback": False}],
    "int4": [{"name": "int4"}],
    "int4, no feedback": [{"name": "int4", "error_feedback": False}],
    "top_k 1 %": [{"name": "top_k", "fraction": 0.01}],
    "top_k 1 %, no feedback": [{"name": "top_k", "fraction": 0.01, "error_feedback": False}],
}


class Bar(NamedTuple):
    """What an arm has to hold against fp32.

    Attributes:
        points: Largest loss of accuracy, mean over the seeds; None for what noise allows: twice the
            standard error of the paired difference.
        fewer: So many times fewer bytes at least.
    """

    points: float | None
    fewer: float


BARS = {"int8": Bar(None, 3.9), "int4": Bar(None, 7.7), "top_k 1 %": Bar(1.0, 30.0)}
"""4 and 8 times fewer, less the scale of each bucket."""


class Outcome(NamedTuple):
    """One arm of one seed.

    Attributes:
        accuracy: On the test pictures after the last round, per cent.
        sent: Bytes that the sites sent in a round without assessment.
        seconds: Wall seconds of the run.
    """

    accuracy: float
    sent: int
    seconds: float


Seed = Mapping[str, Outcome]
"""Outcomes by arm."""


def config(task: str, arm: str, seed: int, rounds: int) -> dict[str, Any]:
    """A run file."""
    work = WORKLOADS[task]
    name = arm.replace(" ", "-").replace(",", "").replace("%", "percent")
    return {
        "name": f"{task}-{name}-{seed}",
        "rounds": rounds,
        "seed": seed,
        "task": {"name": task, "params": {**work.params, "split_seed": seed}},
        "cohort": {"sites": list(SITES), "quorum": "all", "deadline_s": 600},
        "local": {
            "work": {"epochs": 1},
            "batch_size": BATCH,
            "lr": work.lr,
            "optimizer": {"name": "sgd", "momentum": 0.0},
        },
        "assess": {"every": rounds},
        "strategy": ARMS[arm],
    }


def outcome(result: RunResult) -> Outcome:
    """What counts of a run."""
    sent = sum(site.sent_bytes for site in result.rounds[0].sites)
    return Outcome(100 * result.scores["test.accuracy"], sent, result.seconds)


def one_seed(federation: Federation, task: str, seed: int, rounds: int) -> Seed:
    """All arms with one seed."""
    out = {}
    for arm in ARMS:
        out[arm] = outcome(federation.run(config(task, arm, seed, rounds)))
        accuracy, sent, seconds = out[arm]
        shown = f"{accuracy:.2f} %, {sent / 1e3:.1f} KB a round [{seconds:.0f} s]"
        print(f"{task} seed {seed} {arm}: {shown}", flush=True)
    return out


def losses(seeds: Sequence[Seed], arm: str) -> tuple[float, float]:
    """Points below fp32, mean of the paired differences, and their standard error."""
    gaps = [seed[PLAIN].accuracy - seed[arm].accuracy for seed in seeds]
    return statistics.fmean(gaps), _spread(gaps) / len(gaps) ** 0.5


def fewer(seeds: Sequence[Seed], arm: str) -> float:
    """So many times fewer bytes than fp32."""
    return sum(s[PLAIN].sent for s in seeds) / sum(s[arm].sent for s in seeds)


def shortfalls(task: str, seeds: Sequence[Seed]) -> list[str]:
    """Which bars do not hold."""
    out = []
    for arm, bar in BARS.items():
        lost, error = losses(seeds, arm)
        allowed = 2 * error if bar.points is None else bar.points
        if lost > allowed:
            out.append(f"{task}, {arm}: {lost:.2f} points below fp32, the bar is {allowed:.2f}")
        if fewer(seeds, arm) < bar.fewer:
            times = fewer(seeds, arm)
            out.append(f"{task}, {arm}: {times:.1f} times fewer bytes, the bar is {bar.fewer:g}")
    return out


def part(measured: Mapping[str, Sequence[Seed]], short: Sequence[str], rounds: int) -> str:
    """The part of docs/evidence.md."""
    count = len(next(iter(measured.values())))
    lines = [
        "## Codecs with error feedback",
        "",
        (
            f"`python -m benchmarks.compression --seeds {count}`: seeds 0 to {count - 1}, "
            f"{len(SITES)} sites, IID, {rounds} rounds of one local epoch, batch {BATCH}, SGD without "
            "momentum, FedAvg; test accuracy in per cent after the last round, mean ± standard "
            "deviation over the seeds, and the paired difference to fp32 with its standard error. "
            "Bytes are what all sites send in a round. Codecs have their defaults."
        ),
    ]
    for task, seeds in measured.items():
        work = WORKLOADS[task]
        lines += [
            "",
            f"{work.title}, rate {work.lr:g}:",
            "",
            "| arm | accuracy | fp32 − arm | KB a round | times fewer |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for arm in ARMS:
            values = [seed[arm].accuracy for seed in seeds]
            lost, error = losses(seeds, arm)
            sent = statistics.fmean(seed[arm].sent for seed in seeds) / 1e3
            lines.append(
                f"| {arm} | {statistics.fmean(values):.2f} ± {_spread(values):.2f} "
                f"| {'–' if arm == PLAIN else f'{lost:+.2f} ± {error:.2f}'} "
                f"| {sent:.1f} | {fewer(seeds, arm):.1f} |"
            )
    lines += ["", "All bars hold." if not short else "Fell short: " + "; ".join(short) + "."]
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(prog="compression", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--tasks", default=",".join(WORKLOADS), help="of digits, fashion_mnist")
    parser.add_argument("--out", type=Path, default=EVIDENCE, help="where the tables go")
    options = parser.parse_args(arguments)
    tasks = [task for task in options.tasks.split(",") if task in WORKLOADS]
    settings = {site: {"part": i, "parts": len(SITES)} for i, site in enumerate(SITES)}
    sources = {task: WORKLOADS[task].source for task in tasks}
    with Federation(SITES, sources, settings) as federation:
        measured = {
            task: [one_seed(federation, task, s, options.rounds) for s in range(options.seeds)]
            for task in tasks
        }
    short = [line for task, seeds in measured.items() for line in shortfalls(task, seeds)]
    document = options.out.read_text() if options.out.exists() else "# Evidence\n"
    text = part(measured, short, options.rounds)
    options.out.write_text(written(document, MARK, text))
    print(f"\n{text}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
