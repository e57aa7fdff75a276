"""The control stream: attaches, says what there is to say, hears what is asked, comes back forever."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic

import grpc

from protos.errors import FarflungError, Unavailable
from protos.faults import reach
from protos.rpc import from_rpc_error
from protos.v1 import site_pb2, site_pb2_grpc
from site_agent.link.journal import Journal
from site_agent.link.wire import Wire, backoff

PROTOCOL = 1
WELCOME_S = 20.0
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


class Stream:
    """Keeps a control stream open.

    Args:
        wire: Connections.
        hello: Makes the first message of a stream.
        hear: Called with every message of the orchestrator.
        attached: Called with the orchestrator's welcome, and with None when the stream ended.
        paused: Gives whether the site takes no new plans.
        noted: Called with what is told of a plan, when it is another state than before.
        journal: Log.
    """

    def __init__(
        self,
        wire: Wire,
        hello: Callable[[], site_pb2.Hello],
        hear: Callable[[site_pb2.ToSite], None],
        attached: Callable[[site_pb2.Welcome | None], None],
        paused: Callable[[], bool],
        noted: Callable[[site_pb2.Progress], None],
        journal: Journal,
    ) -> None:
        self._wire, self._hello, self._hear, self._noted = wire, hello, hear, noted
        self._on_attached, self._paused, self._journal = attached, paused, journal
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._lock = threading.Lock()
        self._outgoing: Outgoing | None = None
        self._call: grpc.Call | None = None
        self._outcomes: deque[site_pb2.Outcome] = deque(maxlen=64)
        self.problem = "not connected yet"
        self.attached = False
        self._hurried = False

    # -- from other threads ----------------------------------------------------------------------

    def outcome(self, outcome: site_pb2.Outcome) -> None:
        """Say why a plan ends without a contribution.

        It is said again on the next stream, since this one may break before it arrives.
        """
        with self._lock:
            self._outcomes.append(outcome)
            if self._outgoing is not None and self.attached:
                self._outgoing.say(Said(outcome=outcome))

    def say(self, message: Said) -> bool:
        """Say something, if the stream is there; whether it is."""
        with self._lock:
            if self._outgoing is None or not self.attached:
                return False
            self._outgoing.say(message)
            return True

    def progress(self, progress: site_pb2.Progress) -> None:
        """Say how far a plan is, if the stream is there."""
        with self._lock:
            if self._outgoing is not None:
                self._outgoing.progress(progress)

    def forget(self, plan_id: str) -> None:
        """A plan is over."""
        with self._lock:
            if self._outgoing is not None:
                self._outgoing.forget(plan_id)

    def reconnect(self) -> None:
        """End the stream and begin a new one at once (with new keys)."""
        self._hurry.set()
        self._end_call()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._hurry.set()
        self._end_call()

    @property
    def hurried(self) -> bool:
        """Whether heartbeats are wanted more often."""
        return self._hurried

    @hurried.setter
    def hurried(self, hurried: bool) -> None:
        self._hurried = hurried
        with self._lock:
            if self._outgoing is not None:
                self._outgoing.hurried = hurried

    @property
    def round_trip_s(self) -> float | None:
        """How long a heartbeat takes there and back, or how long one is away; None if unknown."""
        outgoing = self._outgoing
        return outgoing.round_trip_s if outgoing is not None else None

    # -- the thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Attach, and attach again, until stopped."""
        waits = backoff()
        while not self._stop.is_set():
            try:
                was_attached, problem = self._session()
            except FarflungError as error:
                was_attached, problem = False, error
            if self._stop.is_set():
                return
            if was_attached:
                waits = backoff()
            if isinstance(problem, Unavailable) and not was_attached:
                problem = self._wire.diagnose() or problem
            self._tell(problem)
            self._hurry.wait(next(waits))
            if not self._stop.is_set():
                self._hurry.clear()

    def _tell(self, problem: FarflungError) -> None:
        """Log why there is no stream, once for each reason."""
        if problem.message == self.problem:
            return
        self.problem = problem.message
        self._journal.warning("not attached", error=type(problem).__name__, reason=problem.message)

    def _session(self) -> tuple[bool, FarflungError]:
        """One stream from beginning to end; whether it was welcomed, and why it ended."""
        outgoing = Outgoing(self._hello(), self._paused, self._noted)
        channel = self._wire.open()
        deadline = threading.Timer(WELCOME_S, self._end_call)
        deadline.daemon = True
        welcomed = False
        try:
            call = site_pb2_grpc.ControlStub(channel).Attach(outgoing)
            reach("control.dialled")
            with self._lock:
                self._outgoing, self._call = outgoing, call
            if self._stop.is_set():
                call.cancel()
            deadline.start()
            for message in call:
                if message.WhichOneof("kind") == "welcome":
                    deadline.cancel()
                    welcomed = True
                    self._welcomed(outgoing, message.welcome)
                elif message.WhichOneof("kind") == "heartbeat":
                    outgoing.came_back(message.heartbeat.sequence)
                else:
                    reach("control.heard")
                    self._hear(message)
            return welcomed, Unavailable("the orchestrator ended the stream")
        except grpc.RpcError as error:
            return welcomed, from_rpc_error(error)
        finally:
            deadline.cancel()
            outgoing.close()
            with self._lock:
                self._outgoing = self._call = None
                self.attached = False
            if welcomed:
                reach("control.ended")
                self._on_attached(None)
            channel.close()

    def _welcomed(self, outgoing: Outgoing, welcome: site_pb2.Welcome) -> None:
        outgoing.beat(max(0.05, welcome.heartbeat_s or HEARTBEAT_S))
        with self._lock:
            for outcome in self._outcomes:
                outgoing.say(Said(outcome=outcome))
            self.attached = True
            reach("control.attached")
        self._journal.info(
            "attached",
            federation=welcome.federation,
            orchestrator=welcome.version,
            heartbeat_s=welcome.heartbeat_s,
        )
        self.problem = ""
        self._on_attached(welcome)

    def _end_call(self) -> None:
        with self._lock:
            call = self._call
        if call is not None:
            call.cancel()
