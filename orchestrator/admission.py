"""Large uploads take turns where the processors, and not the sites' lines, are the limit.

What a site has sent and nobody has read yet lies in memory, a window of its stream and the message
that is being put together: 9 MiB measured. Uploads over fast lines are read one after the other in
any case; letting all of them begin only fills their windows. So no more begin than are read with
all the processors, unless those that run leave the machine idle: then their lines are slow, their
windows stay empty, and as many again may begin.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from protos.bulk import Chunk
from protos.errors import Unavailable

LARGE_BYTES = 8 << 20
"""A smaller contribution hardly fills a window; it never waits."""

AT_ONCE = max(4, os.cpu_count() or 1)
"""Uploads that may run however fast they are."""

IDLE_BYTES_PER_S = 100e6
"""What all uploads together carry at least where the processors are the limit. A core decrypts,
hashes and writes some 300 MB/s."""

LOOK_S = 0.5
"""How long they are watched before more may begin."""


class Admission:
    """Who may send now, in the order in which they asked.

    Args:
        at_once: See `AT_ONCE`.
        look_s: See `LOOK_S`.
    """

    def __init__(self, at_once: int = AT_ONCE, look_s: float = LOOK_S) -> None:
        self._at_once, self._look_s = at_once, look_s
        self._changed = threading.Condition()
        self._asking: deque[object] = deque()
        self._places, self._taken = at_once, 0
        self._carried, self._since = 0, time.monotonic()

    @contextmanager
    def place(
        self, nbytes: int, alive: Callable[[], bool]
    ) -> Iterator[Callable[[Iterator[Chunk]], Iterator[Chunk]]]:
        """Wait for a turn and have it; gives what the chunks have to be passed through.

        Args:
            nbytes: Of the whole contribution.
            alive: Whether it is still worth waiting.

        Raises:
            Unavailable: It is not.
        """
        if nbytes < LARGE_BYTES:
            yield lambda chunks: chunks
            return
        self._enter(alive)
        try:
            yield self._counted
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
                        raise Unavailable("upload: the site went away before its turn")
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
        elif watched_s >= self._look_s:
            idle = self._carried < IDLE_BYTES_PER_S * watched_s
            self._places = 2 * self._taken if idle else self._at_once
            self._carried, self._since = 0, now
        return self._taken < self._places

    def _counted(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        for chunk in chunks:
            with self._changed:
                self._carried += len(chunk.data)
            yield chunk
