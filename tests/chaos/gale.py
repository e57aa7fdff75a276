"""What goes wrong in a storm: which fault, where, when and for how long follows from a seed."""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

import psutil

from protos.errors import FarflungError
from protos.faults import Fault
from tests.support.clock import clocks_possible
from tests.support.disk import small_disks_possible
from tests.support.faulty import ORCHESTRATOR, FaultyFederation, Place
from tests.support.field import SITES, Field

ENDS = (ORCHESTRATOR, *SITES)
STUCK_S = 240.0
"""No round is committed for so long: the run hangs."""
LOOK_S = 0.05
ARMED_S = 15.0
"""How long a process may take to get to the point where something is to go wrong."""
CLOCK_S = 10.0
FULL = ("disk", "does not fit", "free at this site", "No space left")
"""What a run says that was paused because a disk was full."""
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
            with suppress(psutil.NoSuchProcess):
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
