"""A storm of faults against a real federation, and what survived it.

    python -m tests.chaos.storm --minutes 20 --rate 300 --seed 1

Three sites and a daemon train rounds with an encoded update and its error feedback (int8), momentum at
the sites and at the orchestrator, and calibration; all three sites have to be in every round. For the
given minutes faults come at random times, so many an hour: which ones, where and when follows from the
seed. Whatever dies is started again at once, as systemd would; a run that is paused because a disk was
full is taken up again, as its operator would. Then the run is stopped, the ledger verified, every round
computed again, and the same run done in another home with no faults at all: it says what each model has
to be, and how many rounds an hour there are without faults.

The last line is all of that in figures. The exit code is 0 if the bars hold: every round replays to its
digests, `verify` finds nothing, the models are those of the undisturbed run, at least 95 % of the sites
that were asked took part in each round, at least 60 % of the rounds an hour, no internal error.
"""

from __future__ import annotations

import argparse
import heapq
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orchestrator.federation import DAEMON
from protos.errors import FarflungError
from protos.faults import Fault
from tests.support.clock import clocks_possible
from tests.support.disk import small_disks_possible
from tests.support.faulty import ORCHESTRATOR, FaultyFederation, Place
from tests.support.field import SITES, Field

ENDS = (ORCHESTRATOR, *SITES)
LEAST_RATE, LEAST_PART = 0.6, 0.95
STUCK_S = 240.0
"""No round is committed for so long: the run hangs."""
LOOK_S = 0.05
ARMED_S = 15.0
"""How long a process may take to get to the point where something is to go wrong."""
CLOCK_S = 10.0
FULL = ("disk", "does not fit", "free at this site", "No space left")
"""What a run says that was paused because a disk was full."""
DISK_BYTES = 192 << 20
CALM_ROUNDS = 8
"""Without faults, before the storm and after it: other work of the machine is then about the same."""
ROUNDS = 10_000
"""More than any storm has."""

KILLED_AT = {
    "daemon": (
        "spool.chunk.written", "spool.adopted", "accept.inserted", "ledger.written",
        "ledger.committed", "gather.counted", "round.closed", "reduce.done", "round.committing",
        "attach.welcomed", "store.put", "assess.gathered",
    ),
    "link": (
        "outbox.synced", "outbox.renamed", "outbox.verdict.renamed", "contribute.sent",
        "contribute.answered", "fetch.chunk.written", "job.done", "plan.accepted",
        "control.attached",
    ),
    "trainer": (
        "checkpoint.written", "checkpoint.renamed", "train.epoch.ended", "payload.written",
        "payload.state.written", "train.encoded", "prepare.told",
    ),
}  # fmt: skip
FULL_AT = {
    "daemon": ("part.chunk.written", "blob.synced", "adopt.moved", "spool.index.written"),
    "link": ("outbox.head.written", "fetch.chunk.written", "outbox.synced"),
    "trainer": ("checkpoint.written", "payload.written", "payload.state.written"),
}
"""Writes that may find the disk full."""


@dataclass
class Gale:
    """What happened in a storm.

    Attributes:
        faults: How many of each kind.
        rounds: Committed in it.
        seconds: It took.
        given_up: Attempts that were.
        resumed: Times that the operator had the run go on.
        why: What must not have happened; empty if nothing.
    """

    faults: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    seconds: float = 0.0
    given_up: int = 0
    resumed: int = 0
    why: str = ""


@dataclass
class Outcome:
    """What survived.

    Attributes:
        gale: The storm itself.
        seed: Of it.
        calm_rate: Rounds an hour without faults.
        rounds: Committed in all, with those before and after the storm.
        replayed: Rounds that were computed again to the same digests.
        part: Share of the asked sites that took part, in the round with the fewest.
        unassessed: Rounds whose model was not assessed by all of them.
        identical: Whether every model is the undisturbed run's.
        problems: What `verify`, the logs and the replays say.
    """

    gale: Gale
    seed: int
    calm_rate: float = 0.0
    rounds: int = 0
    replayed: int = 0
    part: float = 0.0
    unassessed: int = 0
    identical: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Rounds an hour in the storm."""
        return self.gale.rounds / self.gale.seconds * 3600 if self.gale.seconds else 0.0

    @property
    def sound(self) -> bool:
        """Whether nothing was lost or changed."""
        return (
            not self.gale.why
            and not self.problems
            and self.rounds > 0
            and self.replayed == self.rounds
            and self.part >= LEAST_PART
            and self.identical
        )

    @property
    def holds(self) -> bool:
        """Whether the bars hold."""
        return self.sound and self.rate >= LEAST_RATE * self.calm_rate

    def line(self) -> str:
        """The figures."""
        kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(self.gale.faults.items()))
        share = self.rate / self.calm_rate if self.calm_rate else 0.0
        return (
            f"storm of {self.gale.seconds / 60:.1f} min, seed {self.seed}:"
            f" {self.gale.faults.total()} faults ({kinds});"
            f" {self.gale.rounds} rounds, {self.rate:.0f} an hour of {self.calm_rate:.0f} without"
            f" faults ({share:.0%}); {self.gale.given_up} attempts given up,"
            f" {self.gale.resumed} times taken up by the operator;"
            f" replayed {self.replayed} of {self.rounds};"
            f" verify and logs: {len(self.problems)} problems; at least {self.part:.0%} of the"
            f" sites in each round; {self.unassessed} rounds not assessed by all;"
            f" {'identical' if self.identical else 'NOT IDENTICAL'}"
        )


Kind = Literal[
    "kill", "kill at a point", "cut", "sever", "freeze", "throttle", "delay", "bytes on the line",
    "stop", "rot in the spool", "rot in the outbox", "full disk", "clock",
]  # fmt: skip


class Storm:
    """Faults at random times.

    Args:
        ground: The federation.
        rate: Faults an hour.
        seed: Of what is drawn.
        kinds: Which ones; all that this machine can do by default.
    """

    def __init__(self, ground: Field, rate: float, seed: int, kinds: tuple[Kind, ...] = ()) -> None:
        self._federation: FaultyFederation = ground.federation
        self._draw, self._every_s = random.Random(seed), 3600 / rate
        self._todo: dict[str, Callable[[], None]] = {
            "kill": self._kill, "kill at a point": self._kill_at, "cut": self._cut,
            "sever": self._sever, "freeze": self._freeze, "throttle": self._throttle,
            "delay": self._delay, "bytes on the line": self._meddle, "stop": self._stop,
            "rot in the spool": self._rot_spool, "rot in the outbox": self._rot_outbox,
            "full disk": self._fill, "clock": self._turn,
        }  # fmt: skip
        self._kinds = kinds or tuple(k for k in self._todo if k != "clock" or not clocks_possible())
        self._began = 0.0
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0
        self._rotting: dict[str, tuple[Place, str]] = {}
        self._armed: dict[str, str] = {}
        self.gale = Gale()

    def blow(self, run: str, seconds: float) -> Gale:
        """Let it rage; gives what happened."""
        federation, gale = self._federation, self.gale
        self._began = time.monotonic()
        before = len(federation.committed(run))
        moved, at = before, self._began
        self._soon(self._draw.expovariate(1 / self._every_s), self._strike)
        while (now := time.monotonic()) < self._began + seconds and not gale.why:
            while self._agenda and self._agenda[0][0] <= now:
                heapq.heappop(self._agenda)[2]()
            self._tend(run)
            if (count := len(federation.committed(run))) > moved:
                moved, at = count, now
            elif now - at > STUCK_S:
                gale.why = f"no round was committed for {STUCK_S:g} s"
            time.sleep(LOOK_S)
        gale.seconds, gale.rounds = time.monotonic() - self._began, moved - before
        return gale

    def calm(self, run: str) -> None:
        """The end of it: everything is mended."""
        federation = self._federation
        self._agenda.clear()
        for end in ENDS:
            federation.forgive(end)
            federation.resume(end)
            with suppress(RuntimeError):
                federation.turn_clock(end, 0)
        for site in SITES:
            federation.mend(site)
            federation.empty(site)
        federation.revive(wait=False)
        federation.await_that(self._answers, "a daemon", STUCK_S)
        federation.await_sites(SITES)
        self._tend(run)

    def _answers(self) -> bool:
        try:
            return bool(self._federation.client.status())
        except FarflungError:
            return False

    def _tend(self, run: str) -> None:
        """What systemd and an operator do."""
        federation = self._federation
        for end, (place, kind) in list(self._rotting.items()):
            child = federation.agents().get(end, federation.daemon)
            if not child.alive:
                del self._rotting[end], self._armed[end]
                with suppress(FileNotFoundError):
                    federation.rot(end, place)
                    self._count(kind, end)
        for end, kind in list(self._armed.items()):
            if end not in self._rotting and federation.struck(end):
                del self._armed[end]
                self._count(kind, end)
        for name in federation.revive(wait=False):
            self._say(f"{name} is started again")
        state, reason = federation.state(run)
        if state == "paused" and any(words in reason for words in FULL):
            with suppress(FarflungError):
                federation.client.extend(run, ROUNDS)
                self.gale.resumed += 1
                self._say(f"taken up again: {reason}")
        elif state not in ("queued", "running"):
            self.gale.why = f"the run is {state}: {reason}"

    # -- faults --------------------------------------------------------------------------------------

    def _soon(self, seconds: float, do: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._agenda, (time.monotonic() + seconds, self._number, do))

    def _strike(self) -> None:
        self._soon(self._draw.expovariate(1 / self._every_s), self._strike)
        self._one()

    def _one(self) -> None:
        self._todo[self._draw.choice(self._kinds)]()

    def _count(self, kind: str, where: str, seconds: float = 0.0) -> None:
        self.gale.faults[kind] += 1
        self._say(f"{kind}: {where}" + (f" for {seconds:.1f} s" if seconds else ""))

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f} s  {text}", flush=True)

    def _for(
        self, kind: str, where: str, least_s: float, most_s: float, undo: Callable[[], None]
    ) -> None:
        seconds = self._draw.uniform(least_s, most_s)
        self._count(kind, where, seconds)
        self._soon(seconds, undo)

    def _site(self) -> str:
        return self._draw.choice(SITES)

    def _process(self) -> tuple[str, str]:
        """An end and a kind of process there."""
        process = self._draw.choice(("daemon", "link", "trainer"))
        return (ORCHESTRATOR if process == "daemon" else self._site()), process

    def _kill(self) -> None:
        end, process = self._process()
        for one in self._federation.family(end, process):
            one.kill()
        self._count(f"kill {process}", end)

    def _kill_at(self) -> None:
        end, process = self._process()
        at = self._draw.choice(KILLED_AT[process])
        self._arm(end, f"kill {process} at a point", Fault(at, process=process))

    def _arm(self, end: str, kind: str, fault: Fault) -> bool:
        """Have something go wrong when a process gets somewhere; one thing at a time at an end."""
        if end in self._armed:
            self._one()
            return False
        self._armed[end] = kind
        self._federation.fail(end, fault)

        def forgive() -> None:
            if self._armed.get(end) is kind and self._federation.forgive(end):
                del self._armed[end]
                self._rotting.pop(end, None)
                self._one()  # it was not to be; another one in its place

        self._soon(ARMED_S, forgive)
        return True

    def _cut(self) -> None:
        site = self._site()
        self._federation.cut(site)
        self._count("cut", site)

    def _sever(self) -> None:
        site = self._site()
        self._federation.sever(site)
        self._for("sever", site, 0.5, 4, lambda: self._federation.mend(site))

    def _freeze(self) -> None:
        site, way = self._site(), self._draw.choice(("up", "down", "both"))
        self._federation.freeze(site, way)  # type: ignore[arg-type]
        self._for("freeze", site, 1, 6, lambda: self._federation.mend(site))

    def _throttle(self) -> None:
        site = self._site()
        self._federation.throttle(site, self._draw.uniform(1, 10))
        self._for("throttle", site, 3, 10, lambda: self._federation.mend(site))

    def _delay(self) -> None:
        site = self._site()
        self._federation.delay(site, self._draw.uniform(0.02, 0.3))
        self._for("delay", site, 3, 10, lambda: self._federation.mend(site))

    def _meddle(self) -> None:
        site, way = self._site(), self._draw.choice(("up", "down"))
        how = self._draw.choice(("corrupt", "duplicate", "reorder"))
        after = self._draw.randrange(200_000)
        getattr(self._federation, how)(site, way, after)
        self._count(f"{how} on the line", f"{site}, {way}")

    def _stop(self) -> None:
        end, process = self._process()
        whole = self._draw.random() < 0.5
        self._federation.stop(end, "" if whole else process)
        kind = "stop the daemon" if end == ORCHESTRATOR else "stop a site"
        self._for(kind, end, 0.5, 4, lambda: self._federation.resume(end))

    def _rot_spool(self) -> None:
        fault = Fault("spool.chunk.written", self._draw.randint(1, 3), process="daemon")
        self._rot(ORCHESTRATOR, "spool", fault)

    def _rot_outbox(self) -> None:
        self._rot(self._site(), "outbox", Fault("outbox.admitted", process="link"))

    def _rot(self, end: str, place: Place, fault: Fault) -> None:
        kind = f"kill and rot in the {place}"
        if self._arm(end, kind, fault):
            self._rotting[end] = (place, kind)

    def _fill(self) -> None:
        site = self._site()
        if not small_disks_possible() and self._draw.random() < 0.5:
            self._federation.fill(site)
            self._for("full disk", site, 1, 5, lambda: self._federation.empty(site))
            return
        end, process = self._process()
        at = self._draw.choice(FULL_AT[process])
        self._arm(end, f"full disk of a {process}", Fault(at, do="raise", process=process))

    def _turn(self) -> None:
        end = self._draw.choice(ENDS)
        seconds = self._draw.choice((-3600, -60, -5, 5, 60, 3600))
        self._federation.turn_clock(end, seconds)
        self._count("clock", f"{end}, {seconds:+d} s")
        self._soon(CLOCK_S, lambda: self._federation.turn_clock(end, 0))


# -- the program --------------------------------------------------------------------------------------


def ground_at(root: Path, stormy: bool) -> Field:
    """A federation that keeps everything; the stormy one can be disturbed in every way."""
    faults: dict[str, Any] = {}
    if stormy:
        disks = {} if small_disks_possible() else dict.fromkeys(SITES, DISK_BYTES)
        faults = {"lines": True, "disks": disks, "clocks": not clocks_possible()}
    return Field(
        root,
        daemon={"retention": {"contributions": "all"}},
        trainer={"checkpoint": 0.2},
        **faults,
    )


def config_of(ground: Field, seed: int) -> dict[str, Any]:
    """The run: everything in it has a state to lose."""
    return ground.config(
        "storm",
        rounds=ROUNDS,
        seed=seed,
        task={"name": "blobs", "params": {"hidden": 60_000, "samples": 600}},
        cohort={"quorum": "all", "deadline_s": 600, "attempts": 20},
        local={
            "work": {"epochs": 3},
            "batch_size": 20,
            "lr": 0.05,
            "optimizer": {"name": "sgd", "momentum": 0.9, "keep_state": True},
        },
        strategy=[{"name": "int8"}, {"name": "fedavgm"}, {"name": "temperature"}],
    )


def launched(ground: Field, seed: int) -> str:
    """A run whose first round is committed: everything is warm."""
    federation = ground.federation
    run = federation.launch(config_of(ground, seed))
    federation.await_that(lambda: len(federation.committed(run)) >= 1, "the first round", STUCK_S)
    return run


def storm(
    root: Path,
    minutes: float,
    rate: float,
    seed: int,
    kinds: tuple[Kind, ...] = (),
    calm_rounds: int = CALM_ROUNDS,
) -> Outcome:
    """The storm, and what survived.

    Args:
        root: An empty folder. What the processes said stays in it.
        minutes: How long.
        rate: Faults an hour.
        seed: Of faults and run.
        kinds: Which faults; all that this machine can do by default.
        calm_rounds: How many before the storm and after it.
    """
    stormy, models = ground_at(root / "stormy", True), dict[int, str]()
    federation = stormy.federation
    with federation:
        blowing = Storm(stormy, rate, seed, kinds)
        outcome = Outcome(blowing.gale, seed)
        try:
            run = launched(stormy, seed)
            before_s = _seconds_of(federation, run, calm_rounds)
            blowing.blow(run, minutes * 60)
            if not blowing.gale.why:
                blowing.calm(run)
                _seconds_of(federation, run, 1)  # the one under way
                after_s = _seconds_of(federation, run, calm_rounds)
                outcome.calm_rate = 2 * calm_rounds / (before_s + after_s) * 3600
                federation.client.stop(run)
                federation.wait(run, STUCK_S)
            models = federation.committed(run)
            if not blowing.gale.why:
                _look_back(federation, run, outcome)
        except TimeoutError as error:
            blowing.gale.why = str(error)
        finally:
            _keep_logs(federation)
    if not blowing.gale.why:
        quiet = ground_at(root / "quiet", False)
        with quiet.federation:
            right = _undisturbed(quiet, seed, len(models))
        outcome.identical = right == models
        for number in sorted(n for n in models if right.get(n) != models[n])[:1]:
            outcome.problems.append(f"round {number} is the first with another model")
    return outcome


def _look_back(federation: FaultyFederation, run: str, outcome: Outcome) -> None:
    """Verify the run, compute its rounds again, and read the logs."""
    client, gale = federation.client, outcome.gale
    found = client.verify(run)
    outcome.problems += [one.text for one in (*found.problems, *found.erased)]
    rounds = [one for one in federation.rounds(run) if one.round and one.state == "committed"]
    gale.given_up = sum(one.attempt - 1 for one in rounds)
    outcome.rounds = len(rounds)
    outcome.unassessed = sum(bool(one.unassessed) for one in rounds)
    outcome.part = 1.0
    for one in rounds:
        done = client.replay(run, one.round)
        outcome.part = min(outcome.part, len(done.sites) / len(SITES))
        if done.identical:
            outcome.replayed += 1
        else:
            outcome.problems.append(f"round {one.round} does not replay: {done.compared}")
    for log in (federation.home.log / "daemon.jsonl", federation.root / "log" / f"{DAEMON}.log"):
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        outcome.problems += [line[:400] for line in lines if "internal error" in line]


def _seconds_of(federation: FaultyFederation, run: str, rounds: int) -> float:
    """How long so many rounds take, from now on."""
    began, last = time.monotonic(), len(federation.committed(run)) + rounds
    federation.await_that(
        lambda: len(federation.committed(run)) >= last, f"{rounds} rounds more", STUCK_S * rounds
    )
    return time.monotonic() - began


def _undisturbed(ground: Field, seed: int, rounds: int) -> dict[int, str]:
    """Models of a run that nothing disturbs."""
    federation, run = ground.federation, launched(ground, seed)
    _seconds_of(federation, run, max(0, rounds - len(federation.committed(run))))
    federation.client.stop(run, now=True)
    models = federation.committed(run)
    return {number: models[number] for number in range(1, rounds + 1)}


def _keep_logs(federation: FaultyFederation) -> None:
    """The sites' logs, whose disks go with their federation."""
    for site in SITES:
        if (log := federation.folder(site) / "log").exists():
            shutil.copytree(log, federation.root / "log" / site, dirs_exist_ok=True)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=300.0, help="faults an hour")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--root", type=Path, help="where to run; a folder that is removed if not given"
    )
    chosen = parser.parse_args()
    root = chosen.root or Path(tempfile.mkdtemp(prefix="storm-"))
    for why in (small_disks_possible(), clocks_possible()):
        if why:
            print(f"left out: {why}")
    outcome = storm(root, chosen.minutes, chosen.rate, chosen.seed)
    for problem in [*([outcome.gale.why] if outcome.gale.why else []), *outcome.problems]:
        print(f"problem: {problem}")
    if outcome.sound and not chosen.root:
        shutil.rmtree(root)
    else:
        print(f"logs and homes are in {root}")
    print(outcome.line())
    return 0 if outcome.holds else 1


if __name__ == "__main__":
    sys.exit(main())
