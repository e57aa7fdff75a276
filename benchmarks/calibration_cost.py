"""What does calibration add to a round? Bytes and seconds, at five local epochs.

    python -m benchmarks.calibration_cost [--rounds 6] [--examples 60000] [--width 512]

All of Fashion-MNIST over five sites. The same run without an assessment, with scores, with a
temperature, and with conformal sets behind it. Bytes are compared between the arms; time within each
round, the seconds of its assessment against those of everything else, so that what else the machine
does falls on both alike. The first round of each run, in which sites load what they need, is left out.
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
EPOCHS = 5
MOST_BYTES, MOST_TIME = 64 * 1024, 0.03


class Cost(NamedTuple):
    """One arm.

    Attributes:
        sent: Bytes that a site sends in a round.
        seconds: Of each round.
        assessing: Of which so many are the assessment's.
    """

    sent: float
    seconds: tuple[float, ...]
    assessing: tuple[float, ...]

    @property
    def share(self) -> float:
        """What the assessment adds to the rest of a round; the median over the rounds."""
        pairs = zip(self.seconds, self.assessing, strict=True)
        return statistics.median(part / (whole - part) for whole, part in pairs)


def config(arm: str, rounds: int, examples: int, width: int) -> dict[str, Any]:
    """A run file."""
    return {
        "name": f"cost-{arm.replace(', ', '-').replace(' ', '-')}",
        "rounds": rounds,
        "seed": 0,
        "task": {
            "name": "held_out",
            "params": {
                "data": "fashion_mnist_all",
                "train": examples,
                "held": examples // 6,
                "val": 0.5,
                "width": width,
            },
        },
        "cohort": {"sites": list(SITES), "quorum": "all", "deadline_s": 600},
        "local": {"work": {"epochs": EPOCHS}, "batch_size": 32, "lr": 0.05},
        "assess": {"every": 0 if arm == NONE else 1},
        "strategy": ARMS[arm],
    }


def cost(result: RunResult) -> Cost:
    """Of the rounds but the first."""
    rounds = result.rounds[1:]
    sent = statistics.fmean(site.sent_bytes for entry in rounds for site in entry.sites)
    seconds = tuple((r.committed or 0.0) - r.started for r in rounds)
    return Cost(sent, seconds, tuple(r.seconds.get("assessing", 0.0) for r in rounds))


def shortfalls(costs: Mapping[str, Cost]) -> list[str]:
    """Which bars do not hold; calibration is all that an assessment does."""
    out = []
    sent = costs[SETS].sent - costs[NONE].sent
    if sent > MOST_BYTES:
        out.append(f"{sent / 1024:.1f} KiB a site and round, the bar is {MOST_BYTES // 1024}")
    for arm in (TEMPERATURE, SETS):
        if costs[arm].share > MOST_TIME:
            time = 100 * costs[arm].share
            out.append(f"{arm}: {time:.1f} % of a round's time, the bar is {100 * MOST_TIME:g}")
    return out


def part(
    costs: Mapping[str, Cost], short: Sequence[str], rounds: int, examples: int, width: int
) -> str:
    """The part of docs/evidence.md."""
    lines = [
        "## What calibration adds to a round",
        "",
        (
            f"`python -m benchmarks.calibration_cost --rounds {rounds} --examples {examples} "
            f"--width {width}`: "
            f"Fashion-MNIST, {examples} pictures to train on and {examples // 6} held out, "
            f"{len(SITES)} sites, MLP with two hidden layers of {width}, {EPOCHS} local epochs; medians "
            f"over {rounds - 1} rounds. Added is the time of the assessment against that of the rest of "
            "the round; sent is what a site sends in a round, its contribution included."
        ),
        "",
        "| arm | seconds a round | added | KiB sent by a site | added |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for arm, found in costs.items():
        sent = (found.sent - costs[NONE].sent) / 1024
        lines.append(
            f"| {arm} | {statistics.median(found.seconds):.2f} | {100 * found.share:+.1f} % "
            f"| {found.sent / 1024:.1f} | {sent:+.1f} |"
        )
    lines += ["", "All bars hold." if not short else "Fell short: " + "; ".join(short) + "."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(prog="calibration-cost", description=(__doc__ or "")[:76])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--examples", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=512, help="of the model's hidden layers")
    parser.add_argument("--out", type=Path, default=EVIDENCE, help="where the table goes")
    options = parser.parse_args(arguments)
    costs: dict[str, Cost] = {}
    with federation() as there:
        for arm in ARMS:
            costs[arm] = cost(
                there.run(config(arm, options.rounds, options.examples, options.width))
            )
            print(f"{arm}: {costs[arm]}", flush=True)
    short = shortfalls(costs)
    text = part(costs, short, options.rounds, options.examples, options.width)
    document = options.out.read_text() if options.out.exists() else "# Evidence\n"
    options.out.write_text(written(document, COST_MARK, text))
    print(f"\n{text}")
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
