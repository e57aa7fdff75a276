"""Kill anywhere: SIGKILL at every fault point and at random moments; all models are the undisturbed run's.

    python -m tests.chaos.kill_anywhere [--sample 40] [--seed 0] [--random 300]

Real federations of three sites train short runs with an encoded update and its error feedback (int8),
momentum at the sites and at the orchestrator, distillation at both, and calibration; all three sites have to
be in every round. A case is a kind of process and a point that it is killed at (``link outbox.renamed``),
among them those that it gets to only after another kill, or a random moment. A run takes as many cases as it
can (`tests.chaos.arena`); it has to end by itself, with the models, outer states, memos, scores and
calibration maps of an undisturbed run, `farflung verify` has to find nothing, and no more steps may be
trained again than processes were killed (sites save after every step). The cases of a run that does not are
halved until it is known which they were. Points that no such run gets to have scenes (`tests.chaos.scenes`).

Finished cases stand in a file and are not run again. The last line is ``N cases, N identical``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.bench.nursery import Nursery
from protos.faults import POINTS
from tests.chaos.arena import EPOCHS, PER_STEP_S, STEPS, Arena, Seen
from tests.chaos.cases import MOMENT, Case, Disturbed, Result, Shape, points
from tests.chaos.recovery import Recoveries, recoveries
from tests.chaos.scenes import CUT_SHORT, PLAYS, SCENES, Stage
from tests.support.field import SITES, Field
from tests.support.warm import WarmFederation

SHAPES = {
    "large": Shape(30_000, 10),
    "small": Shape(12, 6, distils=True),
    "fails": Shape(30_000, 6, fails=True),
    "gateway": Shape(30_000, 6, processes=("gateway",)),
    PLAYS: Shape(200_000, 1),
    CUT_SHORT: Shape(200_000, 1, cut_short=True),
    "whole": Shape(30_000, 13),
}
"""The last one in a federation that has to start its own Ray and its trainers. Of scenes the models have
several chunks, and a run has as many rounds as there are scenes."""
COMPUTE = 4
"""Kills in the compute process. It has no points: nobody knows what it writes until the daemon adopts it.
One that dies five times within five minutes is given up."""
TRIES = 3
"""Runs in which a process is waited for at a point."""

RESULTS = Path("build/kill-anywhere.jsonl")


@dataclass
class Record:
    """What is known, and the file that has it.

    Attributes:
        path: The file: a JSON object on each line.
        done: Results of cases.
        found: Cases that came up.
        sums: Sums over the runs: runs, kills, steps trained, steps trained again, seconds.
        recoveries: Seconds, if they were measured.
    """

    path: Path
    done: dict[str, Result] = field(default_factory=dict)
    found: dict[str, Case] = field(default_factory=dict)
    sums: Counter[str] = field(default_factory=Counter)
    recoveries: Recoveries | None = None

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                self._take(json.loads(line))

    def add(self, line: dict[str, Any]) -> None:
        """Take something up, and write it down."""
        self._take(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _take(self, line: dict[str, Any]) -> None:
        match line:
            case {"name": name}:
                self.done[name] = Result(**line)
            case {"found": name}:
                self.found[name] = Case.named(name)
            case {"runs": _}:
                self.sums.update(line)
            case {"served": _}:
                self.recoveries = Recoveries(**line)


def work_off(arena: Arena, cases: Sequence[Case], record: Record, others: bool = True) -> None:
    """Run what is not done yet, and write down what came of it.

    Args:
        arena: Where.
        cases: Of one shape.
        record: What is done.
        others: Whether to go on with what comes up.
    """
    shape, tries = cases[0].shape, Counter[str]()

    def with_others(cases: Sequence[Case]) -> list[Case]:
        came_up = [case for case in record.found.values() if case.shape == shape]
        return list(dict.fromkeys([*cases, *(came_up if others else [])]))

    batches = [with_others(cases)]
    while batches:
        batch = [case for case in batches.pop() if case.name not in record.done]
        if not batch:
            continue
        began = time.monotonic()
        came = arena.disturb(batch, arena.seed * 1000 + 1 + record.sums["runs"])
        _account(arena, came, record, time.monotonic() - began)
        tried = {case.name for case in came.struck}
        if came.problem and len(came.struck) > 1:
            print(f"run {came.run} is not the undisturbed one: {came.problem}", flush=True)
            half = len(came.struck) // 2
            rest = [case for case in batch if case.name not in tried]
            batches += [rest, came.struck[half:], came.struck[:half]]
            continue
        for case in came.struck:
            _write(record, Result(case.name, True, not came.problem, came.problem))
        tries.update(case.name for case in came.missed)
        if not came.struck and not came.missed:
            tries.update(case.name for case in batch)
        for case in batch:
            if tries[case.name] >= TRIES and case.name not in record.done:
                _write(record, Result(case.name, False, False))
        for name in arena.found:
            if name not in record.found:
                record.add({"found": name})
        batches.append(with_others(batch))


def _account(arena: Arena, came: Disturbed, record: Record, seconds: float) -> None:
    planned = STEPS * len(SITES) * arena.shapes[came.shape].rounds
    record.add(
        {
            "runs": 1,
            "kills": came.kills,
            "steps": planned,
            "again": max(0, came.again),
            "seconds": round(seconds, 1),
        }
    )
    print(
        f"run {came.run}: {len(came.struck)} cases, {came.kills} kills, {came.again} of {planned} steps "
        f"again, {seconds:.0f} s; {len(record.done)} cases done before",
        flush=True,
    )


def _write(record: Record, result: Result) -> None:
    record.add(result._asdict())
    verdict = "identical" if result.identical else f"NOT identical: {result.why}"
    print(f"  {result.name}: {verdict if result.struck else 'not reached'}", flush=True)


@contextmanager
def ground(
    folder: Path, daemon: dict[str, Any] | None = None, lines: bool = False
) -> Iterator[Field]:
    """A federation that is quickly back: its Ray is kept, its trainers are forked."""
    folder.mkdir()
    nursery = Nursery(folder)
    trainer = {"checkpoint": PER_STEP_S, "command": nursery.command}
    try:
        field = Field(
            folder / "f", daemon=daemon, trainer=trainer, kind=WarmFederation, lines=lines
        )
        with field.federation:
            yield field
    finally:
        nursery.close()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="so many cases, drawn; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=300, help="kills at random moments")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    record, began = Record(chosen.results), time.monotonic()
    before = record.sums["seconds"]
    folder = Path(tempfile.mkdtemp(prefix="kill-anywhere-"))
    with ground(folder / "plain") as field:
        played = {key for scenes in SCENES.values() for key in scenes}
        arena = Arena(field, SHAPES, chosen.seed, elsewhere=played)
        moments = arena.draw.choices(("daemon", "link", "trainer"), k=chosen.random)
        cases = [Case(p, MOMENT, "large", number=n) for n, p in enumerate(moments, 1)]
        known: set[tuple[str, str]] = set()
        shapes = ("large", "small", "fails")
        for shape in shapes:
            fresh = [c for c in arena.cases(shape) if (c.process, c.at) not in known]
            known |= {(c.process, c.at) for c in fresh}
            cases += fresh
            arena.draw.shuffle(cases)
            few = cases[: max(1, chosen.sample // len(shapes))] if chosen.sample else cases
            work_off(arena, few, record, others=not chosen.sample)
            cases = []
    if not chosen.sample:
        with ground(folder / "gateways", {"gateways": {"processes": 1}}) as field:
            arena = Arena(field, SHAPES, chosen.seed)
            work_off(arena, arena.cases("gateway"), record)
        with ground(folder / "stage", lines=True) as field:
            stage = Stage(field, SHAPES, chosen.seed)
            for shape in SCENES:
                work_off(stage, stage.cases(shape), record, others=False)
        plain = Field(folder / "whole", trainer={"checkpoint": PER_STEP_S})
        with plain.federation:
            known = {"whole": Seen({}, [], [], 3.0)}
            arena = Arena(plain, SHAPES, chosen.seed, known=known)
            if record.recoveries is None:
                record.add(vars(recoveries(arena, "whole")))
            cases = [Case("compute", MOMENT, "whole", number=n + 1) for n in range(COMPUTE)]
            work_off(arena, cases, record, others=False)
    starting = time.monotonic() - began - (record.sums["seconds"] - before)
    record.add({"runs": 0, "seconds": round(starting, 1)})
    conclude(record)
    if any(result.struck and not result.identical for result in record.done.values()):
        print(f"what is left of it: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def conclude(record: Record) -> None:
    """Say what came of it all."""
    struck = [result for result in record.done.values() if result.struck]
    at = points(result.name for result in struck)
    print(f"{len(POINTS)} fault points in the code, a process was killed at {len(at)} of them")
    for left in sorted(set(POINTS) - at):
        print(f"  not reached: {left} ({POINTS[left]})")
    sums = record.sums
    print(
        f"{sums['runs']} runs, {sums['kills']} kills in {sums['seconds'] / 60:.0f} minutes; "
        f"{sums['again']} of {sums['steps']} steps were trained again, an epoch has {STEPS // EPOCHS}"
    )
    if (back := record.recoveries) is not None:
        for what, seconds in (
            ("the daemon serves sites", back.served),
            ("the daemon hears of a contribution that it was receiving", back.resumed),
            ("a site is in its epoch again, its task's load apart", back.epoch),
        ):
            print(f"{what}: {median(seconds):.1f} s, at most {max(seconds):.1f} ({len(seconds)})")
    moments = sum(MOMENT in result.name for result in struck)
    print(f"{moments} of the cases at random moments")
    print(f"{len(struck)} cases, {sum(result.identical for result in struck)} identical")


if __name__ == "__main__":
    sys.exit(main())
