"""Processor time and memory of process trees, sampled from /proc."""

from __future__ import annotations

import bisect
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
PROC = Path("/proc")

Member = tuple[int, int]
"""A process: its id and its start time, since ids are given again."""


class Reading(NamedTuple):
    """What the kernel says about one process.

    Attributes:
        parent: Id of its parent.
        started: In ticks since boot.
        own_s: Processor seconds of its threads.
        reaped_s: Processor seconds of the children that it has waited for, with theirs.
        rss_bytes: Resident memory; pages shared with others count in each.
    """

    parent: int
    started: int
    own_s: float
    reaped_s: float
    rss_bytes: int


class Sample(NamedTuple):
    """One moment.

    Attributes:
        time: Seconds since the epoch.
        cpu_s: Processor seconds so far, by group.
        rss_bytes: Resident memory, by group.
        busy_s: Processor seconds that the whole machine has been busy for since boot.
    """

    time: float
    cpu_s: dict[str, float]
    rss_bytes: dict[str, int]
    busy_s: float


def read(pid: int) -> Reading | None:
    """A process's reading; None if it is gone."""
    try:
        text = (PROC / str(pid) / "stat").read_bytes()
    except OSError:
        return None
    # The name in parentheses may hold anything, so count from behind it.
    f = text[text.rindex(b")") + 2 :].split()
    return Reading(
        parent=int(f[1]),
        started=int(f[19]),
        own_s=(int(f[11]) + int(f[12])) / TICK,
        reaped_s=(int(f[13]) + int(f[14])) / TICK,
        rss_bytes=int(f[21]) * PAGE,
    )


def machine_busy_s() -> float:
    """Processor seconds that this machine has been busy for since boot."""
    fields = (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _idle, _wait, interrupt, soft, stolen = (int(x) for x in fields)
    return (user + nice + system + interrupt + soft + stolen) / TICK


class Group:
    """A set of process trees whose time and memory are added up.

    Processor time of a process that ended is in its parent's ``reaped_s`` if the parent lives and
    belongs to the group; otherwise its last own reading is kept.

    Args:
        roots: The roots' ids.
        apart: Words in a command line that take a process, and all below it, out of the group.
        only: The inverse: only processes below one that has such a word.
    """

    def __init__(
        self, roots: Sequence[int], apart: Sequence[str] = (), only: Sequence[str] = ()
    ) -> None:
        self._roots = set(roots)
        self._apart, self._only = tuple(apart), tuple(only)
        self._known: dict[Member, Reading] = {}
        self._lost_s = 0.0

    def rescan(self, table: Mapping[int, Reading]) -> None:
        """Look for processes that were started since.

        Args:
            table: All processes of the machine.
        """
        below: dict[int, list[int]] = {}
        for pid, reading in table.items():
            below.setdefault(reading.parent, []).append(pid)
        todo = [(pid, not self._only) for pid in self._roots if pid in table]
        while todo:
            pid, inside = todo.pop()
            if self._apart or self._only:
                words = _command(pid)
                if any(word in words for word in self._apart):
                    continue
                inside = inside or any(word in words for word in self._only)
            if inside:
                self._known.setdefault((pid, table[pid].started), table[pid])
            todo += [(child, inside) for child in below.get(pid, ())]

    def measure(self) -> tuple[float, int]:
        """Processor seconds so far, and resident bytes now."""
        gone: list[tuple[Member, Reading]] = []
        for member, last in list(self._known.items()):
            now = read(member[0])
            if now is None or now.started != member[1]:
                gone.append((member, last))
                del self._known[member]
            else:
                self._known[member] = now
        alive = {pid for pid, _ in self._known}
        for _, last in gone:
            if last.parent not in alive:
                self._lost_s += last.own_s + last.reaped_s
        bereaved = {last.parent for _, last in gone}
        for member in [m for m in self._known if m[0] in bereaved]:
            # Its child may have ended after it was read, and then was in neither of the two.
            now = read(member[0])
            if now is not None and now.started == member[1]:
                self._known[member] = now
        cpu = self._lost_s + sum(r.own_s + r.reaped_s for r in self._known.values())
        return cpu, sum(r.rss_bytes for r in self._known.values())

    def pss_bytes(self) -> int:
        """Resident memory now, in which a page that n processes share counts 1/n in each.

        Dear (the kernel walks every mapping), so it is asked for and not sampled.
        """
        return sum(_pss(pid) for pid, _ in self._known)


class Sampler:
    """Samples groups in a thread of its own, from entry to exit.

    Args:
        groups: By name.
        every_s: Time between samples.
        rescan_s: Time between searches for new processes.

    Attributes:
        samples: What was seen, oldest first.
    """

    def __init__(
        self, groups: Mapping[str, Group], every_s: float = 0.05, rescan_s: float = 0.25
    ) -> None:
        self.groups = dict(groups)
        self.samples: list[Sample] = []
        self._every_s, self._rescan_s = every_s, rescan_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="sampler", daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def _live(self) -> None:
        scanned = 0.0
        while True:
            now = time.monotonic()
            if now - scanned >= self._rescan_s or self._end.is_set():
                scanned = now
                table = {
                    pid: reading
                    for pid in (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
                    if (reading := read(pid)) is not None
                }
                for group in self.groups.values():
                    group.rescan(table)
            self.samples.append(self._sample())
            if self._end.is_set():
                return
            self._end.wait(self._every_s)

    def _sample(self) -> Sample:
        cpu, rss = {}, {}
        for name, group in self.groups.items():
            cpu[name], rss[name] = group.measure()
        return Sample(time.time(), cpu, rss, machine_busy_s())

    # -- what was seen -------------------------------------------------------------------------

    def cpu_s(self, start: float, end: float, group: str = "") -> float:
        """Processor seconds between two moments, interpolated between samples.

        Args:
            start: Seconds since the epoch.
            end: Likewise.
            group: Of one group; empty for all of them together.
        """
        what = group or "all"
        return self._between(what, end) - self._between(what, start)

    def foreign_cores(self, start: float, end: float) -> float:
        """Processors that everything else kept busy meanwhile; this sampler is part of it."""
        busy = self._between("busy", end) - self._between("busy", start)
        return max(0.0, busy - self.cpu_s(start, end)) / max(end - start, 1e-9)

    def peak_rss_bytes(self, group: str) -> int:
        """The largest resident memory that a group had."""
        return max(sample.rss_bytes[group] for sample in self.samples)

    def _total_at(self, moment: float) -> float:
        return self._between("cpu", moment)

    def _between(self, what: str, moment: float) -> float:
        def value(sample: Sample) -> float:
            if what in sample.cpu_s:
                return sample.cpu_s[what]
            return sample.busy_s if what == "busy" else sum(sample.cpu_s.values())

        at = bisect.bisect_left(self.samples, moment, key=lambda sample: sample.time)
        if at == 0:
            return value(self.samples[0])
        if at == len(self.samples):
            return value(self.samples[-1])
        before, after = self.samples[at - 1], self.samples[at]
        share = (moment - before.time) / (after.time - before.time)
        return value(before) + share * (value(after) - value(before))


def _pss(pid: int) -> int:
    try:
        lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _command(pid: int) -> str:
    try:
        return (
            (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        )
    except OSError:
        return ""
