"""A federation in which a test can have anything go wrong, by one vocabulary.

    federation.kill("east", at="contribute.sent")     # when its link gets there the next time
    federation.fail("east", Fault("outbox.synced", do="raise", error="ENOSPC"))
    federation.stop("east"); federation.resume("east")            # SIGSTOP and SIGCONT
    run = federation.launch(…)
    federation.await_fault("east")
    federation.revive()                                           # what died, as systemd would

The line of each site, with ``lines=True``; ``way`` is "up", "down" or "both"::

    federation.cut("east")                            # all connections are reset; new ones pass
    federation.sever("east")                          # … and new ones are refused
    federation.freeze("east")                         # nothing passes and nothing is closed
    federation.throttle("east", mbit_per_s=2)
    federation.delay("east", seconds=0.2)
    federation.corrupt("east", way="up", after=5000)  # and duplicate, reorder
    federation.mend("east")                           # all of it is over

Disks and clocks::

    federation.rot("east", "outbox", at="outbox.admitted")        # one bit, on the disk
    federation.fill("east"); federation.empty("east")             # with disks={"east": 64 << 20}
    federation.turn_clock("east", -3600)                          # with clocks=True

Sites are named by their names, the daemon as "orchestrator". What happens to bytes on a line, TLS
notices and ends the connection; what happens to bytes on a disk, only digests notice. Small disks need
the right to mount, clocks a C compiler: `disk.small_disks_possible` and `clock.clocks_possible` say
whether they are there. What faults at named points need, `protos.faults` says.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Literal

import psutil

from orchestrator.child import program
from orchestrator.federation import DAEMON, Federation
from protos.errors import ComputeFailed
from protos.faults import DONE, FOLDER, PLAN, TRACE, Fault
from strategies.row import merged
from tests.support import disk
from tests.support.clock import Clock
from tests.support.proxy import Direction, Mischief, Proxy, Way

ORCHESTRATOR = "orchestrator"
LOOK_S = 0.02

PLACES = {
    "spool": "spool/*/*/payload*",
    "store": "store/artefacts/*/*.data",
    "outbox": "contributions/*/payload",
    "state": "contributions/*/state.safetensors",
    "cache": "cache/*.data*",
    "checkpoint": "checkpoint.safetensors",
}
"""Where bytes lie on either end's disk."""
Place = Literal["spool", "store", "outbox", "state", "cache", "checkpoint"]


class FaultyFederation(Federation):
    """See the module.

    Args:
        lines: Whether each site dials through a proxy of its own.
        disks: Bytes of the file system that an end's folder gets to itself.
        clocks: Whether each end's wall clock can be turned.
        given: What a `Federation` takes.
        named: The same.

    Attributes:
        lines: The proxies, by site.
    """

    def __init__(
        self,
        *given: Any,
        lines: bool = False,
        disks: Mapping[str, int] | None = None,
        clocks: bool = False,
        **named: Any,
    ) -> None:
        super().__init__(*given, **named)
        self.lines: dict[str, Proxy] = {}
        self._with_lines, self._disks, self._with_clocks = lines, dict(disks or {}), clocks
        self._clocks: dict[str, Clock] = {}
        self._stopped: dict[str, list[psutil.Process]] = {}

    def configure(self) -> None:
        """Make the home as always, on a disk of its own where one was asked for."""
        for who, nbytes in self._disks.items():
            disk.mount(self._folder_of(who), nbytes)
        super().configure()

    def enroll(self, sites: Sequence[str] | Mapping[str, Any]) -> None:
        """Join sites as always, with a line of their own where that was asked for."""
        for site in sites if self._with_lines else ():
            if site not in self.lines:
                address = self.home.config.listen.bind
                self.lines[site] = Proxy(address).__enter__()
            network = {"network": {"address": self.lines[site].address}}
            self.sites[site] = merged(self.sites[site], network)
        super().enroll(sites)

    def close(self) -> None:
        """End every process, then the lines and disks."""
        for who in (ORCHESTRATOR, *self.sites):
            self.resume(who)  # or nothing there would hear that it is to end
        super().close()
        for line in self.lines.values():
            line.__exit__()
        self.lines.clear()
        for who in self._disks:
            disk.unmount(self._folder_of(who))

    def _variables(self, name: str) -> dict[str, str]:
        return {
            **super()._variables(name),
            **(self._clock(name).variables if self._with_clocks else {}),
            FOLDER: str(self.faults(name)),
        }

    def _folder_of(self, who: str) -> Path:
        return self.home.path if who in (ORCHESTRATOR, DAEMON) else self.folder(who)

    # -- at a named point ----------------------------------------------------------------------------

    def faults(self, who: str) -> Path:
        """The folder that the processes of one end follow."""
        return self.root / "faults" / (DAEMON if who == ORCHESTRATOR else who)

    def fail(self, who: str, fault: Fault) -> None:
        """Have something go wrong at one end, once; what was to go wrong before is forgotten."""
        fault.put(self.faults(who))

    def kill(self, who: str, at: str = "", hit: int = 1, process: str = "") -> None:
        """``kill -9``: at once, a site's agent with its trainer; or a process that reaches a point.

        Args:
            who: The end.
            at: Name of the point; the process that reaches it is killed.
            hit: At which time, from now on.
            process: daemon, link or trainer, where more than one reaches it.
        """
        if at:
            self.fail(who, Fault(at, hit, process=process))
        elif who == ORCHESTRATOR:
            self.kill_daemon()
        else:
            super().kill(who)

    def forgive(self, who: str) -> bool:
        """Take back what has not gone wrong yet; whether there was something."""
        plan = self.faults(who) / PLAN
        found = plan.exists()
        plan.unlink(missing_ok=True)
        return found

    def armed(self, who: str) -> bool:
        """Whether something is still to go wrong."""
        return (self.faults(who) / PLAN).exists()

    def struck(self, who: str) -> bool:
        """Whether what was to go wrong has gone wrong."""
        return (self.faults(who) / DONE).exists()

    def await_fault(self, who: str, timeout_s: float = 60.0) -> None:
        """Wait until it has; and until the daemon or the agent that was killed is gone."""
        self.await_that(lambda: self.struck(who), f"the fault of {who}", timeout_s)
        fault = Fault(**json.loads((self.faults(who) / DONE).read_text()))
        process = next(process for process, at in reversed(self.trace(who)) if at == fault.at)
        if fault.do == "kill" and process != "trainer":
            self._children[DAEMON if who == ORCHESTRATOR else who].join(timeout_s)

    def await_that(
        self, so: Callable[[], bool], what: str, timeout_s: float, *, revive: bool = False
    ) -> None:
        """Wait until something is so that no event tells, with processes that die meanwhile."""
        deadline = time.monotonic() + timeout_s
        while not so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not {what} within {timeout_s:g} s\n{self.told()}")
            if revive:
                self.revive()
            time.sleep(LOOK_S)

    def revive(self, wait: bool = True) -> list[str]:
        """Start what has died, as systemd would; gives who that was.

        Args:
            wait: Whether to wait until a daemon is ready.
        """
        dead = [name for name, child in self._children.items() if not child.alive]
        for name in sorted(dead, key=lambda name: name != DAEMON):
            if name == DAEMON and not wait:
                command = [*program("farflung", "orchestrator.cli"), "serve", "--json"]
                self._start(DAEMON, [*command, "--home", str(self.home.path)])
            elif name == DAEMON:
                try:
                    self.start_daemon()
                except ComputeFailed:  # it was to be killed in its start: once more, the next time
                    if self.daemon.alive:
                        raise
            else:
                self.start_site(name, wait=False)
        return dead

    def trace(self, who: str) -> list[tuple[str, str]]:
        """What was reached so far: kind of process and point, in order."""
        return [(process, point) for process, point, _ in self.timed_trace(who)]

    def timed_trace(self, who: str) -> list[tuple[str, str, float]]:
        """The same, with the seconds of `time.monotonic`."""
        file = self.faults(who) / TRACE
        lines = file.read_text().splitlines() if file.exists() else []
        words = (line.split(" ") for line in lines)
        return [(process, point, float(when)) for process, point, when in words]

    def trace_bytes(self, who: str) -> int:
        """How long the trace is."""
        file = self.faults(who) / TRACE
        return file.stat().st_size if file.exists() else 0

    def traced(self, who: str, process: str, after: int) -> bool:
        """Whether a kind of process got anywhere after so many bytes of the trace."""
        with (self.faults(who) / TRACE).open() as file:
            file.seek(after)
            return any(line.startswith(f"{process} ") for line in file)

    def forget_traces(self) -> None:
        """Begin to trace anew."""
        for who in (DAEMON, *self.sites):
            if (file := self.faults(who) / TRACE).exists():
                os.truncate(file, 0)

    # -- what the ledger says, whether there is a daemon or not --------------------------------------

    def committed(self, run: str) -> dict[int, str]:
        """The model of each committed round so far, but for round 0."""
        words = "SELECT round, model FROM rounds WHERE run = ? AND state = 'committed'"
        return {number: model for number, model in self._asked(words, run) if number}

    def state(self, run: str) -> tuple[str, str]:
        """The state of a run, and its reason."""
        return self._asked("SELECT state, reason FROM runs WHERE id = ?", run)[0]

    def _asked(self, words: str, run: str) -> list[Any]:
        with closing(
            sqlite3.connect(f"file:{self.home.ledger}?mode=ro", uri=True, timeout=10)
        ) as db:
            return db.execute(words, (run,)).fetchall()

    # -- processes -----------------------------------------------------------------------------------

    def family(self, who: str, process: str = "") -> list[psutil.Process]:
        """Processes of one end, the daemon or the link first; only that one or the trainer if told."""
        child = self._children.get(DAEMON if who == ORCHESTRATOR else who)
        tree = child.tree() if child is not None else []
        if process == "trainer":
            return [one for one in tree if "site_agent.trainer" in words_of(one)]
        return tree[:1] if process else tree

    def stop(self, who: str, process: str = "") -> None:
        """SIGSTOP: everything of one end, or only its daemon, link or trainer."""
        for one in self.family(who, process):
            with suppress(psutil.NoSuchProcess):
                one.suspend()
                self._stopped.setdefault(who, []).append(one)

    def resume(self, who: str) -> None:
        """SIGCONT for everything of one end."""
        # What was stopped may belong to a daemon that was killed since, and can't notice it.
        for one in {*self.family(who), *self._stopped.pop(who, ())}:
            with suppress(psutil.NoSuchProcess):
                one.resume()

    # -- lines ---------------------------------------------------------------------------------------

    def cut(self, site: str) -> None:
        """Reset a site's connections; it may connect again at once."""
        self.lines[site].cut()

    def sever(self, site: str) -> None:
        """Reset a site's connections and refuse new ones."""
        self.lines[site].sever()

    def freeze(self, site: str, way: Way = "both") -> None:
        """Half-open: nothing is forwarded and nothing closed; what was on its way comes when it is mended."""
        self.lines[site].freeze(way)

    def throttle(self, site: str, mbit_per_s: float, way: Way = "both") -> None:
        """A slow line."""
        for direction in self._directions(site, way):
            direction.slow(mbit_per_s)

    def delay(self, site: str, seconds: float, way: Way = "both") -> None:
        """A long line: everything comes so much later."""
        for direction in self._directions(site, way):
            direction.delay_s = seconds

    def corrupt(self, site: str, way: Way = "up", after: int = 0) -> threading.Event:
        """Flip a bit on the line once so many more bytes have come; the event tells that it is done."""
        return self._meddle(site, "corrupt", way, after)

    def duplicate(self, site: str, way: Way = "up", after: int = 0) -> threading.Event:
        """The same with bytes that come twice."""
        return self._meddle(site, "duplicate", way, after)

    def reorder(self, site: str, way: Way = "up", after: int = 0) -> threading.Event:
        """The same with bytes that overtake those before them."""
        return self._meddle(site, "reorder", way, after)

    def mend(self, site: str) -> None:
        """End all that is wrong with a site's line."""
        self.lines[site].mend()

    def _meddle(self, site: str, how: Mischief, way: Way, after: int) -> threading.Event:
        (direction,) = self._directions(site, way)
        return direction.meddle(how, after)

    def _directions(self, site: str, way: Way) -> Iterable[Direction]:
        line = self.lines[site]
        return {"up": [line.up], "down": [line.down], "both": [line.up, line.down]}[way]

    # -- disks and clocks ----------------------------------------------------------------------------

    def rot(
        self, who: str, place: Place, at: str = "", process: str = "", timeout_s: float = 60.0
    ) -> Path:
        """Flip a bit in the newest file of a place; everything of that end stands still meanwhile.

        Args:
            who: The end.
            place: See `PLACES`.
            at: Wait until a process gets to this point; at once if empty.
            process: Which kind of process has to get there.
            timeout_s: How long to wait for it.

        Raises:
            FileNotFoundError: There is no such file.
        """
        if at:
            self.fail(who, Fault(at, do="stop", process=process))
            self.await_fault(who, timeout_s)
        self.stop(who)
        try:
            files = [f for f in self._folder_of(who).glob(PLACES[place]) if f.stat().st_size]
            if not files:
                raise FileNotFoundError(f"{who}: nothing in its {place}")
            newest = max(files, key=lambda file: file.stat().st_mtime_ns)
            disk.flip(newest)
        finally:
            self.resume(who)
        return newest

    def fill(self, who: str, leave_bytes: int = 0) -> None:
        """Take all the room on an end's disk, but for so much."""
        disk.fill(self._folder_of(who), leave_bytes)

    def empty(self, who: str) -> None:
        """Give it back."""
        disk.empty(self._folder_of(who))

    def turn_clock(self, who: str, seconds: float) -> None:
        """From now on an end's wall clock is so much ahead of the machine's (behind, if negative)."""
        self._clock(who).turn(seconds)

    def _clock(self, who: str) -> Clock:
        name = DAEMON if who == ORCHESTRATOR else who
        if name not in self._clocks:
            self._clocks[name] = Clock(self.root / "clocks" / name)
        return self._clocks[name]


def words_of(process: psutil.Process) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
