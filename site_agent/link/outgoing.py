"""What a site says on a control stream: messages in order, progress by plan, heartbeats."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic

from protos.faults import reach
from protos.v1 import site_pb2

PROGRESS_S = 0.3
"""A plan's progress is told at most this often."""
STATE_S = 0.1
"""A change of its state is told sooner, but a state that is over before that is not told at all: in a
round of a tenth of a second, six messages of each site would cost more than its work."""
HEARTBEAT_S = 2.0
"""Until the orchestrator says otherwise."""
HURRIED_S = 0.5
"""Heartbeats come at least this often while their delay steers the pace of bulk."""
UNANSWERED = 64
"""An orchestrator of an earlier version sends none back."""

Said = site_pb2.FromSite


class Outgoing:
    """What is to be said on one stream: messages in order, progress by plan, heartbeats.

    Iterating it is what gRPC's sending thread does; it ends when the stream is closed.

    Args:
        hello: The first message.
        paused: Gives whether the site takes no new plans, for heartbeats.
        noted: Called with a progress that leaves, if it tells another state than the one before.
    """

    def __init__(
        self,
        hello: site_pb2.Hello,
        paused: Callable[[], bool],
        noted: Callable[[site_pb2.Progress], None] = lambda _: None,
    ) -> None:
        self._condition = threading.Condition()
        self._messages: deque[Said] = deque([Said(hello=hello)])
        self._progress: dict[str, site_pb2.Progress] = {}
        self._told: dict[str, tuple[float, int, float]] = {}  # when, state, waits_until
        self._paused, self._noted = paused, noted
        self._wakes = float("-inf")  # when whoever waits in `__next__` will look again
        self._sequence = 0
        self._next_beat = monotonic() + HEARTBEAT_S
        self._closed = False
        self._beats: dict[int, float] = {}  # when each left that has not come back
        self._round_trip_s: float | None = None
        self.heartbeat_s = HEARTBEAT_S
        self.hurried = False

    def say(self, message: Said) -> None:
        """Say something, in order."""
        with self._condition:
            self._messages.append(message)
            self._condition.notify_all()

    def beat(self, interval_s: float) -> None:
        """Heartbeats come this often from now on."""
        with self._condition:
            self.heartbeat_s = interval_s
            self._next_beat = monotonic()
            self._condition.notify_all()

    def progress(self, progress: site_pb2.Progress) -> None:
        """Say how far a plan is; only the newest is kept."""
        with self._condition:
            self._progress[progress.plan_id] = progress
            # Called for every chunk: who looks in time anyway is not woken up.
            if self._when(progress) < self._wakes:
                self._condition.notify_all()

    def forget(self, plan_id: str) -> None:
        """A plan is over: nothing more is said of how far it is."""
        with self._condition:
            self._progress.pop(plan_id, None)
            self._told.pop(plan_id, None)

    def close(self) -> None:
        """Nothing more is said."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def __iter__(self) -> Iterator[Said]:
        """The messages, as their time comes."""
        return self

    def __next__(self) -> Said:
        """The next message."""
        with self._condition:
            while not self._closed:
                now = monotonic()
                if self._messages:
                    reach("control.saying")
                    return self._messages.popleft()
                due, when = self._due_progress(now)
                if due is not None:
                    reach("control.progress")
                    return Said(progress=due)
                if now >= self._next_beat:
                    self._next_beat = now + self._interval()
                    self._sequence += 1
                    self._beats[self._sequence] = now
                    self._beats.pop(self._sequence - UNANSWERED, None)
                    beat = site_pb2.Heartbeat(sequence=self._sequence, paused=self._paused())
                    reach("control.beating")
                    return Said(heartbeat=beat)
                self._wakes = min(when, self._next_beat)
                self._condition.wait(max(0.0, self._wakes - now))
                self._wakes = float("-inf")
            raise StopIteration

    def _interval(self) -> float:
        return min(self.heartbeat_s, HURRIED_S) if self.hurried else self.heartbeat_s

    def came_back(self, sequence: int) -> None:
        """The orchestrator sent a heartbeat back."""
        with self._condition:
            sent = self._beats.pop(sequence, None)
            if sent is not None:
                self._round_trip_s = monotonic() - sent
                self._beats = {n: t for n, t in self._beats.items() if n > sequence}

    @property
    def round_trip_s(self) -> float | None:
        """Of the newest heartbeat that came back, or how long one is away; None before the first."""
        with self._condition:
            if self._round_trip_s is None:
                return None
            away = monotonic() - min(self._beats.values(), default=monotonic())
            return max(self._round_trip_s, away)

    def _due_progress(self, now: float) -> tuple[site_pb2.Progress | None, float]:
        """A progress whose time has come, and when the next one's will."""
        soonest = float("inf")
        for plan_id, progress in self._progress.items():
            when = self._when(progress)
            if when <= now:
                del self._progress[plan_id]
                _, *before = self._told[plan_id]
                self._told[plan_id] = (now, progress.state, progress.waits_until)
                if before != [progress.state, progress.waits_until]:
                    self._noted(progress)
                return progress, now
            soonest = min(soonest, when)
        return None, soonest

    def _when(self, progress: site_pb2.Progress) -> float:
        """When it is time to tell a progress; the first state of a plan counts from now."""
        told, state, _ = self._told.setdefault(progress.plan_id, (monotonic(), -1, 0.0))
        return told + (PROGRESS_S if state == progress.state else STATE_S)
