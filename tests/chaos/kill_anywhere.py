"""Kill anywhere: SIGKILL at every fault point, and every round's model is that of an undisturbed run.

    python -m tests.chaos.kill_anywhere [--sample 40] [--seed 0] [--random 300]

A real federation of three sites trains short runs with an encoded update and its error feedback (int8),
momentum at the sites and at the orchestrator, distillation at both, and calibration; all three sites
have to be in every round. An undisturbed run tells what a round reaches; then run after run a process of
each kind is killed in each round, at different ends. Whatever died is started again, as systemd would. A
case is a process and a point (``link outbox.renamed``), or two of them: where the process is killed so that
it gets to the other on its way back (``daemon spool.swept after gather.counted``). It counts as identical
if every model up to the end of its round has the digest of the undisturbed run's. Cases of a group that
does not are tried again, each alone.

The undisturbed run of the same seed comes after each of them: before, the store would have all that the
disturbed run stores.

Finished cases stand in a file, and are not run again. The last line is ``N cases, M identical``.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from orchestrator.federation import DAEMON
from protos.faults import POINTS, Fault
from tests.support.faulty import ORCHESTRATOR
from tests.support.field import SITES, Field

EPOCHS, BATCH, SAMPLES = 2, 20, 120
STEPS = EPOCHS * SAMPLES // BATCH
"""Of one site in one round."""


class Shape(NamedTuple):
    """A kind of run.

    Attributes:
        hidden: Units of the model: of many, contributions travel in calls of their own, of few, with
            the control stream.
        rounds: Of the run.
        distils: Whether the orchestrator distils too, for which it starts a process in every round.
    """

    hidden: int
    rounds: int
    distils: bool


SHAPES = {"large": Shape(30_000, 12, False), "small": Shape(12, 6, True)}

CASE_S = 120.0
PER_STEP_S = 0.001
"""Sites save their training after every step, so a kill costs at most one."""

RESULTS = Path("build/kill-anywhere.jsonl")


@dataclass(frozen=True)
class Case:
    """Where a process is killed.

    Attributes:
        process: daemon, link or trainer.
        at: The point; "a random moment" for none.
        shape: Of the run, see `SHAPES`.
        first: Point at which it is killed before; empty if it gets to the other without.
        number: Tells random moments apart.
    """

    process: str
    at: str
    shape: str = "large"
    first: str = ""
    number: int = 0

    @property
    def name(self) -> str:
        """For people, and for the file of results."""
        words = [self.process, self.at, *(["after", self.first] if self.first else [])]
        return " ".join([*words, f"({self.shape})", *([str(self.number)] if self.number else [])])


@dataclass
class Result:
    """What came of a case.

    Attributes:
        name: Of the case.
        struck: Whether the process got to the point.
        identical: Whether the models are those of the undisturbed run.
        seconds: From the kill to the commit of its round.
        why: What went wrong instead.
    """

    name: str
    struck: bool
    identical: bool
    seconds: float = 0.0
    why: str = ""


@dataclass
class Seen:
    """What an undisturbed run reached.

    Attributes:
        often: How often a process (of each end) got to a point in a round, rounded down.
        seconds: Of a round.
    """

    often: dict[tuple[str, str], int]
    seconds: float


@dataclass
class Arena:
    """A federation in which rounds are disturbed.

    Attributes:
        ground: Its sites.
        seed: Of what is drawn.
        rounds: Of every run; 0 for what its shape says.
        kills: Processes that were killed.
        again: Steps that were trained more than once, over all runs.
        planned: Steps of the undisturbed runs.
        ways_back: Points that a process reached after a kill and not otherwise: where that kill was.
    """

    ground: Field
    seed: int = 0
    rounds: int = 0
    kills: int = 0
    again: int = 0
    planned: int = 0
    ways_back: dict[tuple[str, str], Case] = field(default_factory=dict)
    _seen: dict[str, Seen] = field(default_factory=dict)
    _runs: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    # -- runs ---------------------------------------------------------------------------------------

    def count(self, shape: str) -> int:
        """Rounds of a run."""
        return self.rounds or SHAPES[shape].rounds

    def launch(self, shape: str, seed: int = 0) -> str:
        """A run in which everything has a state to lose."""
        self._runs += 1
        optimizer = {"name": "sgd", "momentum": 0.9, "keep_state": True}
        local = {
            "work": {"epochs": EPOCHS},
            "batch_size": BATCH,
            "lr": 0.05,
            "optimizer": optimizer,
        }
        strategy: list[dict[str, Any]] = [
            {"name": "int8"},
            {"name": "fedavgm"},
            {"name": "self_distillation"},
            {"name": "temperature"},
        ]
        if SHAPES[shape].distils:
            strategy.insert(3, {"name": "feddf", "steps": 3, "samples": 80})
        task = {"name": "blobs", "params": {"hidden": SHAPES[shape].hidden, "samples": SAMPLES}}
        cohort = {"quorum": "all", "deadline_s": 300, "attempts": 10}
        name = f"{shape}-{self._runs}"
        config = self.ground.config(
            name,
            rounds=self.count(shape),
            task=task,
            cohort=cohort,
            local=local,
            strategy=strategy,
            seed=seed,
        )
        return self.ground.federation.launch(config)

    def committed(self, run: str) -> dict[int, str]:
        """The models of a run so far: from the ledger itself, whether there is a daemon or not."""
        ledger = self.ground.federation.home.ledger
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=10)) as db:
            rows = db.execute(
                "SELECT round, model FROM rounds WHERE run = ? AND state = 'committed'", (run,)
            ).fetchall()
        return {number: model for number, model in rows if number}

    def state(self, run: str) -> tuple[str, str]:
        """The state of a run, and its reason."""
        ledger = self.ground.federation.home.ledger
        with closing(sqlite3.connect(f"file:{ledger}?mode=ro", uri=True, timeout=10)) as db:
            found = db.execute("SELECT state, reason FROM runs WHERE id = ?", (run,)).fetchone()
        return found[0], found[1]

    def seen(self, shape: str) -> Seen:
        """What an undisturbed run of a shape reaches and gives."""
        if shape not in self._seen:
            before = self._traced()
            rounds, began = self.count(shape), time.monotonic()
            self._undisturbed(shape, 0)
            after = self._traced()
            often = {
                key: most // rounds
                for key in {(process, point) for _, process, point in after}
                if (most := max(after[w, *key] - before[w, *key] for w in (DAEMON, *SITES)))
                >= rounds - 1
            }
            self._seen[shape] = Seen(often, (time.monotonic() - began) / rounds)
        return self._seen[shape]

    def _traced(self) -> Counter[tuple[str, str, str]]:
        out: Counter[tuple[str, str, str]] = Counter()
        for end in (DAEMON, *SITES):
            out.update(
                (end, process, point) for process, point in self.ground.federation.trace(end)
            )
        return out

    def steps(self) -> int:
        """Steps of training that were made so far."""
        traced = self._traced()
        return sum(traced[site, "trainer", "train.stepped"] for site in SITES)

    # -- cases --------------------------------------------------------------------------------------

    def cases(self, shape: str) -> list[Case]:
        """Every process and point that a round of this shape reaches."""
        often = self.seen(shape).often
        return [Case(process, point, shape) for process, point in sorted(often)]

    def disturb(self, groups: Sequence[Sequence[Case]]) -> Iterator[list[Result]]:
        """One run, disturbed in as many rounds as there are groups; fewer than it has rounds.

        Args:
            groups: Cases of one shape that are tried in one round, each at another end.

        Yields:
            What came of each group; fewer if the run ended before.
        """
        shape = groups[0][0].shape
        seen, before, seed = self.seen(shape), self.steps(), self._runs + 1
        run = self.launch(shape, seed)
        self._await(lambda: len(self.committed(run)) >= 1, run)
        tried: list[tuple[list[Result], int]] = []
        for group in groups:
            if len(self.committed(run)) >= self.count(shape) - 1:
                break  # a kill just after a commit costs two rounds
            results = self._disturbed(run, group, seen)
            tried.append((results, len(self.committed(run))))
            if any(result.why for result in results):
                if self.state(run)[0] == "running":
                    self.ground.federation.client.stop(run, True)
                break
        if self.state(run)[0] == "running":
            self._await(lambda: self.state(run)[0] != "running", run)
        if self.state(run)[0] == "finished":
            planned = STEPS * len(SITES) * self.count(shape)
            self.again += self.steps() - before - planned
            self.planned += planned
        # Only now: before, the store would have had every model of the disturbed run.
        models, right = self.committed(run), self._undisturbed(shape, seed)
        for results, ended in tried:
            for result in results:
                same = all(models[number] == right[number] for number in range(1, ended + 1))
                result.identical = same and not result.why
            yield results

    def _undisturbed(self, shape: str, seed: int) -> dict[int, str]:
        """The models of a run that nothing disturbs."""
        run = self.launch(shape, seed)
        self.ground.federation.wait(run, 60.0 * self.count(shape))
        if self.state(run)[0] != "finished":
            told = self.ground.federation.told()
            raise RuntimeError(f"the undisturbed run is {self.state(run)}\n{told}")
        return self.committed(run)

    def _disturbed(self, run: str, group: Sequence[Case], seen: Seen) -> list[Result]:
        federation, began = self.ground.federation, len(self.committed(run))
        sites = iter(self.draw.sample(SITES, len(SITES)))
        ends = {c: ORCHESTRATOR if c.process == "daemon" else next(sites) for c in group}
        results = {case: Result(case.name, struck=True, identical=False) for case in group}
        traced = {case: len(federation.trace(end)) for case, end in ends.items()}
        try:
            for case, end in ends.items():
                if case.first:
                    self._arm(end, case, case.first, seen)
                    self._await_strikes(run, [end], began + 3, case.shape)
                    self.kills += not federation.forgive(end)
                self._arm(end, case, case.at, seen)
            # A point that is not reached in so many rounds is not reached.
            self._await_strikes(run, list(ends.values()), began + 3, group[0].shape)
            for case, end in ends.items():
                results[case].struck = not federation.forgive(end)
                self.kills += results[case].struck
            struck, count = time.monotonic(), len(self.committed(run))
            ended = min(count + 1, self.count(group[0].shape))
            self._await(lambda: len(self.committed(run)) >= ended, run)
            for result in results.values():
                result.seconds = round(time.monotonic() - struck, 2)
        except (TimeoutError, RuntimeError) as error:
            for result in results.values():
                result.why = str(error)
        for case, end in ends.items():
            if not case.first and results[case].struck:
                for key in set(federation.trace(end)[traced[case] :]) - set(seen.often):
                    if key[0] == case.process:
                        self.ways_back.setdefault(key, case)
        return list(results.values())

    def _arm(self, end: str, case: Case, point: str, seen: Seen) -> None:
        """Have a process killed at a point, at one of the times that it gets there in a round."""
        if point not in POINTS:
            time.sleep(self.draw.uniform(0.0, seen.seconds))  # any moment of a round is as good
            self._kill_now(end, case.process)
            return
        often = seen.often.get((case.process, point), 1)
        hit = self.draw.randint(1, max(1, min(often, 5)))
        self.ground.federation.fail(end, Fault(point, hit, process=case.process))

    def _await_strikes(self, run: str, ends: list[str], limit: int, shape: str) -> None:
        """Wait until nothing is to go wrong any more, or it is too late for it."""
        federation, last = self.ground.federation, min(limit, self.count(shape))

        def over() -> bool:
            waiting = any(federation.armed(end) for end in ends)
            return not waiting or len(self.committed(run)) >= last

        self._await(over, run)

    def _kill_now(self, end: str, process: str) -> None:
        federation = self.ground.federation
        child = federation.daemon if end == ORCHESTRATOR else federation.agents()[end]
        family = child.tree()[: 1 if process != "trainer" else None]
        for one in family:
            if process != "trainer" or "site_agent.trainer" in one.cmdline():
                one.kill()

    def _await(self, so: Any, run: str) -> None:
        def so_or_ended() -> bool:
            state, reason = self.state(run)
            if state in ("paused", "failed"):
                raise RuntimeError(f"the run is {state}: {reason}")
            return bool(so())

        self.ground.federation.await_that(so_or_ended, "the next step", CASE_S, revive=True)


# -- the program --------------------------------------------------------------------------------------


def known(path: Path) -> dict[str, Result]:
    """Cases that are done."""
    if not path.exists():
        return {}
    rows = [Result(**json.loads(line)) for line in path.read_text().splitlines()]
    return {row.name: row for row in rows}


def work_off(arena: Arena, cases: list[Case], done: dict[str, Result], path: Path) -> None:
    """Run what is not done yet, and write down what came of it."""
    todo = [case for case in cases if case.name not in done]
    alone: set[str] = set()
    while todo:
        for results in arena.disturb(groups_of(todo, arena.count(todo[0].shape) - 2, alone)):
            if len(results) > 1 and not all(result.identical for result in results):
                alone |= {result.name for result in results}  # which of them it was
                continue
            for result in results:
                done[result.name] = result
                with path.open("a") as file:
                    file.write(json.dumps(asdict(result)) + "\n")
                verdict = "identical" if result.identical else f"NOT identical {result.why}"
                if not result.struck:
                    verdict = "not reached"
                print(f"{result.name}: {verdict}, {result.seconds:.1f} s", flush=True)
        todo = [case for case in todo if case.name not in done]


def groups_of(todo: Sequence[Case], most: int, alone: set[str]) -> list[list[Case]]:
    """Cases for one run: in a round one of each kind of process, but for those that are to be alone."""
    groups: list[list[Case]] = []
    for case in (c for c in todo if c.shape == todo[0].shape):
        single = bool(case.first) or case.at not in POINTS or case.name in alone
        free = [g for g in groups if not single and all(_fits(case, other, alone) for other in g)]
        if free:
            free[0].append(case)
        elif len(groups) < most:
            groups.append([case])
    return groups


def _fits(case: Case, other: Case, alone: set[str]) -> bool:
    single = bool(other.first) or other.at not in POINTS or other.name in alone
    return not single and case.process != other.process


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=0, help="so many cases, drawn; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=0, help="kills at random moments")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    path: Path = chosen.results
    path.parent.mkdir(parents=True, exist_ok=True)
    done = known(path)
    with tempfile.TemporaryDirectory(prefix="kill-anywhere-") as folder:
        ground = Field(Path(folder) / "f", trainer={"checkpoint": PER_STEP_S})
        with ground.federation:
            arena = Arena(ground, chosen.seed)
            cases: list[Case] = []
            for more in _cases(arena, chosen.sample, chosen.random):
                work_off(arena, more, done, path)
                cases += more
            if not chosen.sample:
                back = [
                    Case(process, point, case.shape, case.at)
                    for (process, point), case in sorted(arena.ways_back.items())
                ]
                work_off(arena, back, done, path)
                cases += back
    _conclude(arena, [done[case.name] for case in cases if case.name in done])
    return 0 if all(r.identical for r in done.values()) else 1


def _cases(arena: Arena, sample: int, moments: int) -> Iterator[list[Case]]:
    """What to do, one shape after the other; in an order of the seed, so that any part is a sample."""
    cases: list[Case] = []
    for shape in SHAPES:
        before = {(case.process, case.at) for case in cases}
        fresh = [c for c in arena.cases(shape) if (c.process, c.at) not in before]
        arena.draw.shuffle(fresh)
        cases += fresh
        yield fresh[: max(1, sample // len(SHAPES))] if sample else fresh
    processes = arena.draw.choices(("daemon", "link", "trainer"), k=moments)
    yield [Case(p, "a random moment", number=n) for n, p in enumerate(processes, 1)]


def _conclude(arena: Arena, results: list[Result]) -> None:
    struck = [result for result in results if result.struck]
    points = {word for r in struck for word in r.name.split() if word in POINTS}
    print(f"{len(POINTS)} fault points in the code, a process was killed at {len(points)} of them")
    for left in sorted(set(POINTS) - points):
        print(f"  not reached: {left} ({POINTS[left]})")
    if arena.planned:
        print(
            f"{arena.kills} kills now: {arena.again} of {arena.planned} steps were trained again; "
            f"an epoch has {STEPS // EPOCHS}"
        )
    same = sum(result.identical for result in struck)
    print(f"{len(struck)} cases, {same} identical")


if __name__ == "__main__":
    sys.exit(main())
