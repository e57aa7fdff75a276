"""Large transfers take turns where the processors, and not the sites' lines, are the limit.

What a site has sent and nobody has read yet lies in memory, a window of its stream and the message
that is being put together: 9 MiB measured. Transfers over fast lines are carried one after the other
in any case; letting all of them begin only fills their windows, and no site has its model before all
have it. So no more begin than are carried with all the processors, unless those that run leave
processors idle, or hardly move anything: then their lines are slow, their windows stay empty, and as
many again may begin.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager

import psutil

from protos.errors import Unavailable

LARGE_BYTES = 8 << 20
"""A smaller transfer hardly fills a window; it never waits."""

AT_ONCE = max(4, os.cpu_count() or 1)
"""Transfers that may run however fast they are."""

IDLE_SHARE = 0.2
"""Of the machine's processors; with so much left they are not the limit."""

SLOW_BYTES_PER_S = 10e6
"""Transfers that carry less together are slow, whatever the processors are busy with. A core decrypts,
hashes and writes some 300 MB/s."""

LOOK_S = 0.5
"""How long they are watched before more may begin."""


class Processors:
    """How busy this machine is."""

    def __init__(self) -> None:
        self._before = psutil.cpu_times()

    def idle(self) -> float:
        """Share of the processors' time with nothing to do, waiting for disks included."""
        before, self._before = self._before, psutil.cpu_times()
        spent = [b - a for a, b in zip(before, self._before, strict=True)]
        free = self._before.idle - before.idle
        free += getattr(self._before, "iowait", 0.0) - getattr(before, "iowait", 0.0)
        return free / sum(spent) if sum(spent) > 0 else 1.0


class Admission:
    """Whose weights may move now, up or down, in the order in which they asked.

    Args:
        at_once: See `AT_ONCE`.
        look_s: See `LOOK_S`.
        idle: Which share of the processors had nothing to do since it was last asked.
    """

    def __init__(
        self,
        at_once: int = AT_ONCE,
        look_s: float = LOOK_S,
        idle: Callable[[], float] | None = None,
    ) -> None:
        self._at_once, self._look_s, self._idle = at_once, look_s, idle or Processors().idle
        self._changed = threading.Condition()
        self._asking: deque[object] = deque()
        self._places, self._taken = at_once, 0
        self._carried, self._since = 0, time.monotonic()

    @contextmanager
    def place(self, nbytes: int, alive: Callable[[], bool]) -> Generator[Callable[[int], None]]:
        """Wait for a turn and have it; gives what has to be told of the bytes that were carried.

        Args:
            nbytes: Of the whole transfer.
            alive: Whether it is still worth waiting.

        Raises:
            Unavailable: It is not.
        """
        if nbytes < LARGE_BYTES:
            yield lambda carried: None
            return
        self._enter(alive)
        try:
            yield self._moved
        finally:
            with self._changed:
                self._taken -= 1
                if not self._taken:
                    self._places = self._at_once
                self._changed.notify_all()

    def _enter(self, alive: Callable[[], bool]) -> None:
        ticket = object()
        with self._changed:
            self._asking.append(ticket)
            try:
                while self._asking[0] is not ticket or not self._free():
                    self._changed.wait(self._look_s)
                    if not alive():
                        raise Unavailable("transfer: the site went away before its turn")
                self._taken += 1
            finally:
                self._asking.remove(ticket)
                self._changed.notify_all()

    def _free(self) -> bool:
        """Whether another may begin; asked by the first in the queue."""
        if self._taken < self._places:
            return True
        now = time.monotonic()
        watched_s = now - self._since
        if watched_s > 2 * self._look_s:  # nobody asked for a while: watch from now on
            self._carried, self._since = 0, now
            self._idle()
        elif watched_s >= self._look_s:
            slow = self._carried < SLOW_BYTES_PER_S * watched_s
            more = self._idle() > IDLE_SHARE or slow
            self._places = 2 * self._taken if more else self._at_once
            self._carried, self._since = 0, now
        return self._taken < self._places

    def _moved(self, carried: int) -> None:
        with self._changed:
            self._carried += carried
