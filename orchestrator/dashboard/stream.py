"""Live events for any number of viewers, from one upstream watch.

A watch that is followed occupies a thread of the daemon for as long as it lives, so all viewers
share one. A viewer that comes back names the last event it has seen: what it missed is read
with a second, finite watch, and the shared one takes over at the number where that ended.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import ParamSpec, Protocol

from starlette.concurrency import run_in_threadpool

from orchestrator.views import Event

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")

KEEPALIVE_S = 15.0
MOST_VIEWERS = 64
# A viewer that has more than this to catch up on loads the page's data anew, which is cheaper.
MOST_MISSED = 2_000
MOST_QUEUED = 1_000
RETRY_MS = 2_000


class Events(Protocol):
    """Events that are being watched."""

    def __iter__(self) -> Iterator[Event]:
        """Oldest first."""
        ...

    def close(self) -> None:
        """Ends it; another thread that waits for the next event gets no more."""
        ...


class Watched(Protocol):
    """What the stream needs of an operator."""

    def watch(self, run: str, after: int, follow: bool) -> Events:
        """Events with a greater number, oldest first; then, if followed, as they happen."""
        ...


class TooManyViewers(Exception):
    """``MOST_VIEWERS`` pages are open already."""


class _Viewer:
    def __init__(self, runs: frozenset[str] | None) -> None:
        self.runs = runs
        self.queue: asyncio.Queue[Event | None] = asyncio.Queue(MOST_QUEUED + 1)

    def wants(self, event: Event) -> bool:
        # The list of runs is on every page, so changes of other runs are for everybody.
        if self.runs is None or not event.run or event.kind == "run":
            return True
        return event.run in self.runs

    def put(self, event: Event | None) -> bool:
        """False if the viewer is too slow: it is let go, and resumes where it stopped."""
        if event is not None and self.queue.qsize() >= MOST_QUEUED:
            return False
        try:
            self.queue.put_nowait(event)
        except asyncio.QueueFull:
            return False
        return True


class EventStream:
    """One followed watch, and the viewers that share it.

    All methods belong to one event loop; only the watch itself runs in a thread of its own.
    """

    def __init__(self, operator: Watched) -> None:
        self._operator = operator
        self._viewers: set[_Viewer] = set()
        self._last = 0
        self._ready = asyncio.Event()
        self._ending = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._upstream: Events | None = None

    def start(self) -> None:
        """Begins to follow the daemon's events."""
        self._loop = asyncio.get_running_loop()
        # A daemon thread: a daemon that does not answer must not keep the process alive.
        threading.Thread(target=self._follow, name="dashboard-events", daemon=True).start()

    def end(self) -> None:
        """Ends every viewer's stream, and the upstream watch."""
        self._ending.set()
        if self._upstream is not None:
            self._upstream.close()
        self._ready.set()
        for viewer in list(self._viewers):
            viewer.put(None)
        self._viewers.clear()

    def end_soon(self) -> None:
        """The same from another thread."""
        self._call(self.end)

    async def events(self, runs: frozenset[str] | None, after: int | None) -> AsyncIterator[str]:
        """Text of one viewer's stream, which is registered when this returns.

        Args:
            runs: Names and ids of the run that is looked at; None for all.
            after: The last event that the viewer has seen, or None if it has seen none.

        Raises:
            TooManyViewers: ``MOST_VIEWERS`` are there already.
        """
        if len(self._viewers) >= MOST_VIEWERS:
            raise TooManyViewers
        await self._ready.wait()
        viewer = _Viewer(runs)
        self._viewers.add(viewer)
        last = self._last
        try:
            missed = None if after is None else await self._missed(after, last)
        except BaseException:
            self._viewers.discard(viewer)
            raise
        return self._text(viewer, last, missed, resumed=after is not None)

    async def _missed(self, after: int, last: int) -> list[Event] | None:
        """What lies between two numbers; None where it is too much, or ``after`` is not ours."""
        if after > last:
            return None

        def read() -> list[Event]:
            return list(islice(self._operator.watch("", after, False), MOST_MISSED + 1))

        events = await run_in_threadpool(read)
        return None if len(events) > MOST_MISSED else events

    async def _text(
        self, viewer: _Viewer, last: int, missed: Iterable[Event] | None, *, resumed: bool
    ) -> AsyncIterator[str]:
        sent = last
        try:
            if missed is None:
                # "reset" tells the page to load its data anew; "hello" gives it a number to
                # resume after, before anything has happened.
                kind = "reset" if resumed else "hello"
                yield f"retry: {RETRY_MS}\nid: {last}\nevent: {kind}\ndata: {{}}\n\n"
            else:
                yield f"retry: {RETRY_MS}\n: resumed\n\n"
                for event in missed:
                    sent = max(sent, event.number)
                    if viewer.wants(event):
                        yield as_text(event)
            while not self._ending.is_set():
                try:
                    item = await asyncio.wait_for(viewer.queue.get(), KEEPALIVE_S)
                except TimeoutError:
                    yield ": keepalive\n\n"
                    continue
                if item is None:
                    return
                if item.number > sent:
                    yield as_text(item)
        finally:
            self._viewers.discard(viewer)

    def _deliver(self, event: Event) -> None:
        self._last = max(self._last, event.number)
        for viewer in list(self._viewers):
            if viewer.wants(event) and not viewer.put(event):
                viewer.put(None)
                self._viewers.discard(viewer)

    def _caught_up(self, last: int) -> None:
        self._last = max(self._last, last)
        self._ready.set()

    def _follow(self) -> None:
        """The thread: reads to the present first, then hands on whatever happens."""
        last, caught_up, wait_s = 0, False, 0.2
        while not self._ending.is_set():
            try:
                if not caught_up:
                    for event in self._operator.watch("", last, False):
                        last = event.number
                    caught_up = True
                    self._call(self._caught_up, last)
                self._upstream = self._operator.watch("", last, True)
                if self._ending.is_set():  # end() came before there was anything to close
                    self._upstream.close()
                for event in self._upstream:
                    last, wait_s = event.number, 0.2
                    self._call(self._deliver, event)
            except Exception as error:  # noqa: BLE001 - whatever it is, the page waits and retries
                if not self._ending.is_set():
                    _log.warning("dashboard: the event stream broke (%s); trying again", error)
            self._ending.wait(wait_s)
            wait_s = min(wait_s * 2, 5.0)

    def _call(self, method: Callable[_P, None], *args: _P.args, **kwargs: _P.kwargs) -> None:
        if self._loop is None:  # never started
            return
        try:
            self._loop.call_soon_threadsafe(partial(method, *args, **kwargs))
        except RuntimeError:  # the loop is closed: the server has stopped
            self._ending.set()


def as_text(event: Event) -> str:
    """An event as server-sent text; its JSON has no line breaks."""
    return f"id: {event.number}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"
