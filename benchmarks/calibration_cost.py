"""What does calibration add to a round? Bytes and seconds, at five local epochs.

    python -m benchmarks.calibration_cost [--rounds 6] [--examples 60000]

All of Fashion-MNIST over five sites. The same run without an assessment, with scores, with a
temperature, and with conformal sets behind it; the arms take turns, so that what else the machine
does falls on all of them alike. Seconds are medians over the rounds but the first of each run.
Writes its part of docs/evidence.md and exits 1 if a bar falls short.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.calibration import COST_MARK, SITES, federation
from benchmarks.evidence_seeds import EVIDENCE, written
from benchmarks.harness import RunResult

NONE, SCORES, TEMPERATURE, SETS = (
    "no assessment",
    "scores",
    "scores, temperature",
    "scores, temperature, conformal",
)
ARMS: dict[str, list[dict[str, Any]]] = {
    NONE: [],
    SCORES: [],
    TEMPERATURE: [{"name": "temperature"}],
    SETS: [{"name": "temperature"}, {"name": "conformal"}],
}
EPOCHS, TURNS = 5, 2
MOST_BYTES, MOST_TIME = 64 * 1024, 0.03


class Cost(NamedTuple):
    """One arm.

    Attributes:
        sent: Bytes that a site sends in a round.
        seconds: Of each round.
    """

    sent: float
    seconds: tuple[float, ...]


def config(arm: str, turn: int, rounds: int, examples: int) -> dict[str, Any]:
    """A run file."""
    return {
        "name": f"cost-{arm.replace(', ', '-').replace(' ', '-')}-{turn}",
        "rounds": rounds,
        "seed": 0,
        "task": {
            "name": "held_out",
            "params": {
                "data": "fashion_mnist_all",
                "train": examples,
                "held": examples // 6,
                "val": 0.5,
            },
        },
        "cohort": {"sites": list(SITES), "quorum": "all", "deadline_s": 600},
        "local": {"work": {"epochs": EPOCHS}, "batch_size": 32, "lr": 0.05},
        "assess": {"every": 0 if arm == NONE else 1},
        "strategy": ARMS[arm],
    }


def cost(results: Sequence[RunResult]) -> Cost:
    """Of the rounds but the first of each run, where what a site loads is counted, too."""
    rounds = [entry for result in results for entry in result.rounds[1:]]
    sent = statistics.fmean(site.sent_bytes for entry in rounds for site in entry.sites)
    return Cost(sent, tuple((r.committed or 0.0) - r.started for r in rounds))


def added(costs: Mapping[str, Cost], arm: str, to: str) -> tuple[float, float]:
    """Bytes a site and round, and the share of the round's time, that one arm adds to another."""
    more, less = costs[arm], costs[to]
    time = statistics.median(more.seconds) / statistics.median(less.seconds) - 1
    return more.sent - less.sent, time


def shortfalls(costs: Mapping[str, Cost]) -> list[str]:
    """Which bars do not hold; calibration is what comes with scores, map and sets."""
    out = []
    sent, _ = added(costs, SETS, NONE)
    if sent > MOST_BYTES:
        out.append(f"{sent / 1024:.1f} KiB a site and round, the bar is {MOST_BYTES // 1024}")
    _, time = added(costs, SETS, NONE)
    if time > MOST_TIME:
        out.append(f"{100 * time:.1f} % of a round's time, the bar is {100 * MOST_TIME:g}")
    return out


def part(costs: Mapping[str, Cost], short: Sequence[str], rounds: int, examples: int) -> str:
    """The part of docs/evidence.md."""
    lines = [
        "## What calibration adds to a round",
        "",
        (
            f"`python -m benchmarks.calibration_cost --rounds {rounds} --examples {examples}`: "
            f"Fashion-MNIST, {examples} pictures to train on and {examples // 6} held out, "
            f"{len(SITES)} sites, MLP with two hidden layers of 128, {EPOCHS} local epochs; median "
            f"and quartiles over {TURNS * (rounds - 1)} rounds. "
            "Sent is what a site sends in a round, its contribution included."
        ),
        "",
        "| arm | seconds a round | quartiles | added | KiB sent by a site | added |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for arm, found in costs.items():
        low, middle, high = statistics.quantiles(found.seconds, n=4)
        sent, time = added(costs, arm, NONE)
        lines.append(
            f"| {arm} | {middle:.2f} | {low:.2f} to {high:.2f} | {100 * time:+.1f} % "
            f"| {found.sent / 1024:.1f} | {sent / 1024:+.1f} |"
        )
    lines += ["", "All bars hold." if not short else "Fell short: " + "; ".join(short) + "."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(prog="calibration-cost", description=(__doc__ or "")[:76])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--out", type=Path, default=EVIDENCE, help="where the table goes")
    options = parser.parse_args(arguments)
    results: dict[str, list[RunResult]] = {arm: [] for arm in ARMS}
    with federation() as there:
        for turn in range(TURNS):
            for arm, found in results.items():
                found.append(there.run(config(arm, turn, options.rounds, options.examples)))
                print(f"{arm}: {found[-1].seconds:.1f} s", flush=True)
    costs = {arm: cost(found) for arm, found in results.items()}
    short = shortfalls(costs)
    text = part(costs, short, options.rounds, options.examples)
    document = options.out.read_text() if options.out.exists() else "# Evidence\n"
    options.out.write_text(written(document, COST_MARK, text))
    print(f"\n{text}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
