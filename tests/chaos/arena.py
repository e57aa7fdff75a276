"""Runs in which processes are killed one after the other, at every end at once.

At each end, the orchestrator and every site, there is always one process that is to be killed: at a point,
or after a drawn time. Once it was, what died is started again, as systemd would, and the next case of that
end is set up before it is back, so that starts are hit as well as rounds. A run goes on through all that and
has to end by itself; it is then compared with a run of the same seed that nothing disturbs, round by round.
That one comes after it: before, the store would have all that the disturbed run stores.
"""

from __future__ import annotations

import json
import random
import sqlite3
import time
from collections import Counter
from collections.abc import Container, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from math import inf
from typing import Any

import psutil

from protos.errors import ComputeFailed, Unavailable
from protos.faults import Fault
from tests.chaos.cases import MOMENT, Case, Disturbed, Shape
from tests.support.faulty import ORCHESTRATOR, words_of
from tests.support.field import SITES, Field

EPOCHS, BATCH, SAMPLES = 2, 20, 120
STEPS = EPOCHS * SAMPLES // BATCH
"""Of one site in one round."""

PER_STEP_S = 0.001
"""Sites save their training after every step, so a kill costs at most one."""

DEADLINE_S = 12.0
"""Where sites contribute what they have done by then."""

LOOK_S, END_S = 0.03, 0.5
STANDSTILL_S = 180.0
ROUSE_S = 2.0
"""A point that no undisturbed round reaches: so long after the last kill there is another one."""
ROUSED_MOST = 8
PATIENCE = 2
"""Rounds in which a process gets to a point, or it does not."""
AT_ENDS = {"daemon": True, "gateway": True, "compute": True, "link": False, "trainer": False}
"""Kinds of process: whether they are the orchestrator's."""
ONCE = ("trainer", "compute")
"""Killed twice in a round, the plan of a trainer fails, and compute too often in minutes is given up."""


@dataclass
class Seen:
    """What an undisturbed run reached.

    Attributes:
        often: How often a process gets to a point in a round, at least 1.
        first: Those that it gets to before the first round is committed, in order.
        last: Those that it gets to after the last one is.
        seconds: Of a round.
    """

    often: dict[tuple[str, str], int]
    first: list[tuple[str, str]]
    last: list[tuple[str, str]]
    seconds: float


@dataclass
class End:
    """One end of a run, and what is to go wrong there.

    Attributes:
        name: Of the site, or `ORCHESTRATOR`.
        case: What is set up; None for nothing.
        since: Rounds that were committed then.
        due: When it is killed, of a random moment, and unknown while it does nothing; when there is
            another kill, of a point that needs one.
        mark: How far its trace was then.
        roused: Such kills.
        spared: Round in which its trainer, or compute, was killed: not twice in one.
        read: How far its trace was read.
    """

    name: str
    case: Case | None = None
    since: int = 0
    due: float = 0.0
    mark: int = 0
    roused: int = 0
    spared: int = -1
    read: int = 0


@dataclass
class Arena:
    """A federation in which runs are disturbed.

    Attributes:
        ground: Its sites.
        shapes: Of runs, by name.
        seed: Of what is drawn.
        found: Cases that came up: points that are reached only after a kill.
        known: What undisturbed runs of a shape reach; looked at where it is not given.
        elsewhere: Processes and points that scenes are played for; they do not come up here.
        interval: Steps between two checkpoints of a site: what a kill may cost.
    """

    ground: Field
    shapes: dict[str, Shape]
    seed: int = 0
    found: dict[str, Case] = field(default_factory=dict)
    known: dict[str, Seen] = field(default_factory=dict)
    elsewhere: Container[tuple[str, str]] = ()
    interval: int = 1
    _runs: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    # -- runs ---------------------------------------------------------------------------------------

    def launch(self, shape: str, seed: int) -> str:
        """A run in which everything has a state to lose."""
        self._runs += 1
        what = self.shapes[shape]
        optimizer = {"name": "sgd", "momentum": 0.9, "keep_state": True}
        strategy: list[dict[str, Any]] = [
            {"name": "int8"},
            {"name": "fedavgm"},
            {"name": "self_distillation"},
            {"name": "temperature"},
        ]
        if what.distils:
            strategy.insert(3, {"name": "feddf", "steps": 3, "samples": 80})
        more = {"assess": {"holdout": True}} if what.fails else {}
        cohort: dict[str, Any] = {"quorum": "all", "deadline_s": 600, "attempts": 50}
        if what.cut_short:
            cohort |= {"deadline_s": DEADLINE_S, "partial": True}
        config = self.ground.config(
            f"{shape}-{self._runs}",
            rounds=what.rounds,
            task={"name": "blobs", "params": {"hidden": what.hidden, "samples": SAMPLES}},
            cohort=cohort,
            local={
                "work": {"epochs": EPOCHS},
                "batch_size": BATCH,
                "lr": 0.05,
                "optimizer": optimizer,
            },
            strategy=strategy,
            seed=seed,
            **more,
        )
        return self.ground.federation.launch(config)

    def told(self, run: str) -> tuple[str, str, int]:
        """A run's state, its reason, and how many rounds it has committed, the first model apart."""
        federation = self.ground.federation
        return (*federation.state(run), len(federation.committed(run)))

    def rounds(self, run: str) -> dict[int, tuple[Any, ...]]:
        """What a run came to, for each round: model, outer state, memos, scores, calibration."""
        words = (
            "SELECT round, model, outer_state, memos, summary FROM rounds "
            "WHERE run = ? AND state = 'committed' ORDER BY round"
        )
        with closing(sqlite3.connect(self.ground.federation.home.ledger, timeout=10)) as db:
            rows = db.execute(words, (run,)).fetchall()
        out = {}
        for number, model, outer, memos, text in rows:
            summary = json.loads(text)
            scores = [summary.get(name) for name in ("scores", "site_scores", "calibration")]
            out[number] = (model, outer, memos, *scores)
        return out

    def undisturbed(self, shape: str, seed: int, fails: bool = False) -> dict[int, tuple[Any, ...]]:
        """What a run comes to that nothing disturbs, but trainings that fail if there are to be some."""
        run = self.launch(shape, seed)
        for number in range(self.shapes[shape].rounds if fails else 0):
            self.ground.federation.await_that(
                lambda n=number: self.told(run)[2] >= n, f"round {number}", STANDSTILL_S
            )
            self._fail()
        self.ground.federation.wait(run, 60.0 * self.shapes[shape].rounds)
        self.ground.clear()
        state, reason, _ = self.told(run)
        if state != "finished":
            told = self.ground.federation.told()
            raise RuntimeError(f"the undisturbed run is {state}: {reason}\n{told}")
        return self.rounds(run)

    # -- points -------------------------------------------------------------------------------------

    def seen(self, shape: str) -> Seen:
        """What an undisturbed run of a shape reaches."""
        if shape not in self.known:
            federation = self.ground.federation
            federation.forget_traces()
            rounds, began = self.shapes[shape].rounds, time.monotonic()
            self.undisturbed(shape, self.seed * 1000, self.shapes[shape].fails)
            seconds = (time.monotonic() - began) / rounds
            whole: Counter[tuple[str, str]] = Counter()
            early, late = dict[tuple[str, str], None](), dict[tuple[str, str], None]()
            traces = {end: federation.timed_trace(end) for end in (ORCHESTRATOR, *SITES)}
            commits = [t for _, at, t in traces[ORCHESTRATOR] if at == "round.committing"]
            for trace in traces.values():
                whole |= Counter((process, at) for process, at, _ in trace)
                for process, at, when in trace:
                    if when < commits[0]:
                        early[process, at] = None
                    if when > commits[-1]:
                        late[process, at] = None
            often = {key: max(1, count // rounds) for key, count in whole.items()}
            seldom = {key for key, count in whole.items() if count < rounds - 1}
            first = [key for key in early if key in seldom]
            last = [key for key in late if key in seldom and key not in early]
            self.known[shape] = Seen(often, first, last, seconds)
        return self.known[shape]

    def cases(self, shape: str) -> list[Case]:
        """Every process and point that a run of this shape reaches."""
        processes = self.shapes[shape].processes
        reached = [key for key in sorted(self.seen(shape).often) if key not in self.elsewhere]
        return [Case(*key, shape) for key in reached if key[0] in processes]

    def _fail(self) -> None:
        """A site's training fails in the next step."""
        (self.ground.switches[self.draw.choice(SITES)] / "fault").write_text("raise once")

    def steps(self) -> int:
        """Steps of training that were made since the traces began."""
        stepped = ("trainer", "train.stepped")
        return sum(self.ground.federation.trace(site).count(stepped) for site in SITES)

    # -- a disturbed run ----------------------------------------------------------------------------

    def disturb(self, cases: Sequence[Case], seed: int) -> Disturbed:
        """One run, disturbed by as many cases of a shape as it has time for."""
        shape = cases[0].shape
        out = Disturbed(shape)
        seen = self.seen(shape)
        todo = self._in_order(cases, seen)
        for name in (ORCHESTRATOR, *SITES):
            self.ground.federation.forgive(name)
        self.ground.federation.forget_traces()
        out.run = self.launch(shape, seed)
        ends = [End(name) for name in (ORCHESTRATOR, *SITES)]
        try:
            self._through(out, ends, todo, seen)
        except (TimeoutError, RuntimeError) as error:
            out.problem = str(error)
        self._recover(out, ends)
        if not out.problem:
            out.again = self.steps() - STEPS * len(SITES) * self.shapes[shape].rounds
            out.problem = self._difference(out, shape, seed)
        return out

    def _in_order(self, cases: Sequence[Case], seen: Seen) -> list[Case]:
        """As given, but first what happens only at the begin of a run, as it happens there."""
        place = {key: number for number, key in enumerate(seen.first)}
        key = lambda case: place.get((case.process, case.at), len(place))  # noqa: E731
        return sorted(cases, key=key)

    def _through(self, out: Disturbed, ends: list[End], todo: list[Case], seen: Seen) -> None:
        federation, moved, before = self.ground.federation, time.monotonic(), (0, 0)
        failed = -1
        while True:
            state, reason, done = self.told(out.run)
            if self.shapes[out.shape].fails and done > failed:
                failed = done
                self._fail()
            if state in ("finished", "stopped", "paused", "failed"):
                if state != "finished":
                    raise RuntimeError(f"the run is {state}: {reason}")
                time.sleep(END_S)  # what is reached at its very end has been by then
                ended = [end for end in ends if end.case is not None and end.case.at != MOMENT]
                out.struck += [end.case for end in ended if federation.struck(end.name)]
                out.kills += sum(federation.struck(end.name) for end in ended)
                return
            for end in ends:
                self._tend(out, end, todo, seen, done)
            if before != (done, out.kills):
                before, moved = (done, out.kills), time.monotonic()
            if time.monotonic() > moved + STANDSTILL_S:
                raise TimeoutError(f"nothing for {STANDSTILL_S:g} s\n{federation.told()}")
            federation.revive(wait=False)
            time.sleep(LOOK_S)

    def _tend(self, out: Disturbed, end: End, todo: list[Case], seen: Seen, done: int) -> None:
        federation, now = self.ground.federation, time.monotonic()
        if (case := end.case) is not None:
            if case.at == MOMENT:
                lives = case.process == "compute"  # it has no points
                lives = lives or federation.traced(end.name, case.process, end.mark)
                if end.due == inf and lives:
                    end.due = now + self.draw.uniform(0.0, 2 * seen.seconds)
                struck = now >= end.due and self.kill_now(end.name, case.process)
            else:
                struck = federation.struck(end.name)
                if not struck and case.roused and now >= end.due:
                    end.due, end.mark = inf, federation.trace_bytes(end.name)
                    out.kills += self._rouse(end, case)
                elif end.due == inf and federation.traced(end.name, case.process, end.mark):
                    end.due = now + ROUSE_S + seen.seconds  # it is back, and may still get there
            gone = end.roused > ROUSED_MOST if case.roused else done > end.since + PATIENCE
            if struck:
                out.struck.append(case)
                out.kills += 1
                self._look_for_others(end, case, seen)
                if case.process in ONCE:
                    end.spared = done
            elif gone and federation.forgive(end.name):
                out.missed.append(case)
            else:
                return
            end.case = None
        last = done >= self.shapes[todo[0].shape].rounds - 1 if todo else False
        for case in todo:
            if self._fits(end, case, seen, done, last):
                todo.remove(case)
                self._set_up(end, case, seen, done)
                return

    def _fits(self, end: End, case: Case, seen: Seen, done: int, last: bool) -> bool:
        if AT_ENDS[case.process] is not (end.name == ORCHESTRATOR):
            return False
        if case.process in ONCE and end.spared == done:
            return False
        key = (case.process, case.at)
        if key in seen.first and not case.roused:
            return done == 0
        return last or key not in seen.last

    def _set_up(self, end: End, case: Case, seen: Seen, done: int) -> None:
        end.case, end.since, end.roused = case, done, 0
        end.due, end.mark = inf, self.ground.federation.trace_bytes(end.name)
        if case.roused:
            end.due = time.monotonic() + ROUSE_S
        if case.at != MOMENT:
            often = 1 if case.roused else seen.often.get((case.process, case.at), 1)
            hit = self.draw.randint(1, min(often, 5))
            self.ground.federation.fail(end.name, Fault(case.at, hit, process=case.process))

    def _rouse(self, end: End, case: Case) -> bool:
        """Kill something else at an end, or the daemon, so that a process gets where it does not."""
        end.roused += 1
        if end.name == ORCHESTRATOR:
            return self.kill_now(end.name, "daemon")
        # A trainer goes on only with what the one before it has left half done.
        if case.process == "trainer":
            return self._trains(end.name) and self.kill_now(end.name, "trainer")
        name, process = [(end.name, "trainer"), (end.name, "link"), (ORCHESTRATOR, "daemon")][
            self.draw.randrange(3)
        ]
        return self.kill_now(name, process)

    def _trains(self, site: str) -> bool:
        """Waits until a site makes a step; False if it makes none."""
        trace, until = self.ground.federation.trace, time.monotonic() + ROUSE_S
        before = len(trace(site))
        while time.monotonic() < until:
            if ("trainer", "train.stepped") in trace(site)[before:]:
                return True
            time.sleep(LOOK_S / 10)
        return False

    def _look_for_others(self, end: End, case: Case, seen: Seen) -> None:
        """What was reached there that no undisturbed run gets to."""
        trace = self.ground.federation.trace(end.name)
        for process, at in dict.fromkeys(trace[end.read :]):
            if (process, at) in seen.often or (process, at) in self.elsewhere:
                continue
            if process in self.shapes[case.shape].processes:
                other = Case(process, at, case.shape, roused=True)
                self.found.setdefault(other.name, other)
        end.read = len(trace)

    def kill_now(self, name: str, process: str) -> bool:
        """SIGKILL for one process of an end; whether there was something to kill."""
        federation = self.ground.federation
        child = federation.daemon if name == ORCHESTRATOR else federation.agents()[name]
        family = child.tree()
        if process == "gateway":
            family = [one for one in family if "orchestrator.gateway" in words_of(one)]
        elif process in ONCE:
            family = family[1:]
            if (
                process == "compute"
            ):  # its driver, its supervisors, Ray's own processes, or a worker
                self.draw.shuffle(family)
        else:
            family = family[:1]
        for one in family[:1]:
            with suppress(psutil.NoSuchProcess):  # it ended while this was looking
                one.kill()
                return True
        return False

    def _recover(self, out: Disturbed, ends: list[End]) -> None:
        """Everybody is back, and nothing is to go wrong any more."""
        federation = self.ground.federation
        self.ground.clear()
        for end in ends:
            federation.forgive(end.name)
        federation.await_that(self.serves, "a daemon", STANDSTILL_S, revive=True)
        federation.await_sites(SITES)
        if self.told(out.run)[0] in ("running", "queued"):
            federation.client.stop(out.run, True)

    def serves(self) -> bool:
        """Whether there is a daemon that answers."""
        try:
            self.ground.federation.daemon.first_line(STANDSTILL_S)
            return bool(self.ground.federation.client.sites())
        except (
            ComputeFailed,
            Unavailable,
        ):  # it was to be killed in its start, or at the run's end
            return False

    def _difference(self, out: Disturbed, shape: str, seed: int) -> str:
        """What is wrong with a run that has ended; empty for nothing."""
        found = self.ground.federation.client.verify(out.run)
        if found.problems:
            return f"verify: {found.problems[0].text}"
        if out.again > out.kills * self.interval:
            return f"{out.again} steps were trained again after {out.kills} kills"
        is_, should = self.rounds(out.run), self.undisturbed(shape, seed)
        words = ("model", "outer state", "memos", "scores", "site scores", "calibration")
        for number in should:
            for what, one, other in zip(words, is_[number], should[number], strict=True):
                if one != other:
                    return f"round {number}: another {what}"
        return ""
