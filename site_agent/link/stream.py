"""The control stream: attaches, says what there is to say, hears what is asked, comes back forever."""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

import grpc

from protos.errors import FarflungError, Unavailable
from protos.faults import reach
from protos.rpc import from_rpc_error
from protos.v1 import site_pb2, site_pb2_grpc
from site_agent.link.journal import Journal
from site_agent.link.outgoing import HEARTBEAT_S, Outgoing, Said
from site_agent.link.wire import Wire, backoff

PROTOCOL = 1
WELCOME_S = 20.0
LET_GO_S = 10.0
"""gRPC ends a call and closes its channel in less, or, now and then, never (grpc/grpc#20026)."""
LEFT_BEHIND = 3
"""So many in a row, and a new process is wanted."""
_LOOK_S = 1.0


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
        self._begun: Outgoing | None = None  # of the session that counts
        self._due = math.inf  # when that has to be attached, or over
        self._left_behind = 0
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
        """Attach, and attach again, until stopped.

        Raises:
            Unavailable: gRPC did not end several connections in a row.
        """
        waits = backoff()
        while not self._stop.is_set():
            try:
                was_attached, problem = self._attempt(
                    Outgoing(self._hello(), self._paused, self._noted)
                )
            except FarflungError as error:
                was_attached, problem = False, error
            if self._stop.is_set():
                return
            if self._left_behind == LEFT_BEHIND:
                raise problem
            if was_attached:
                waits = backoff()
            if isinstance(problem, Unavailable) and not was_attached:
                problem = self._wire.diagnose() or problem
            self._tell(problem)
            self._hurry.wait(next(waits))
            if not self._stop.is_set():
                self._hurry.clear()

    def _attempt(self, outgoing: Outgoing) -> tuple[bool, FarflungError]:
        """One stream, in a thread that is left behind if gRPC does not end it.

        Returns:
            Whether it was welcomed, and why it ended.
        """
        ended: queue.SimpleQueue[tuple[bool, FarflungError] | Exception] = queue.SimpleQueue()

        def session() -> None:
            try:
                ended.put(self._session(outgoing))
            except Exception as error:  # noqa: BLE001 - raised again by who waits
                ended.put(error)

        with self._lock:
            self._begun, self._due = outgoing, monotonic() + WELCOME_S + LET_GO_S
        threading.Thread(target=session, name="session", daemon=True).start()
        while True:
            try:
                found = ended.get(timeout=_LOOK_S)
            except queue.Empty:
                if monotonic() < self._due:
                    continue
                found = self._over(outgoing), Unavailable("gRPC did not end the last connection")
                self._left_behind += 1
                self._journal.warning("a connection is left behind", number=self._left_behind)
            else:
                self._left_behind = 0
            with self._lock:
                self._begun = None
            if isinstance(found, Exception):
                raise found
            return found

    def _tell(self, problem: FarflungError) -> None:
        """Log why there is no stream, once for each reason."""
        if problem.message == self.problem:
            return
        self.problem = problem.message
        self._journal.warning("not attached", error=type(problem).__name__, reason=problem.message)

    def _session(self, outgoing: Outgoing) -> tuple[bool, FarflungError]:
        """One stream from beginning to end; whether it was welcomed, and why it ended."""
        channel = self._wire.open()
        deadline = threading.Timer(WELCOME_S, self._end_call)
        deadline.daemon = True
        welcomed = False
        try:
            call = site_pb2_grpc.ControlStub(channel).Attach(outgoing)
            reach("control.dialled")
            with self._lock:
                counts = self._begun is outgoing
                if counts:
                    self._outgoing, self._call = outgoing, call
            if self._stop.is_set() or not counts:
                call.cancel()
            deadline.start()
            for message in call:
                if self._begun is not outgoing:
                    break  # it was left behind, and another has its place
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
            self._over(outgoing)
            channel.close()

    def _over(self, outgoing: Outgoing) -> bool:
        """Nothing more is said on a stream; whether it was attached till now."""
        outgoing.close()
        with self._lock:
            if self._begun is not outgoing:
                return False
            was_attached, self.attached = self.attached, False
            self._outgoing = self._call = None
            self._due = min(self._due, monotonic() + LET_GO_S)
        if was_attached:
            reach("control.ended")
            self._on_attached(None)
        return was_attached

    def _welcomed(self, outgoing: Outgoing, welcome: site_pb2.Welcome) -> None:
        outgoing.beat(max(0.05, welcome.heartbeat_s or HEARTBEAT_S))
        with self._lock:
            for outcome in self._outcomes:
                outgoing.say(Said(outcome=outcome))
            self.attached, self._due = True, math.inf
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
                self._due = min(self._due, monotonic() + LET_GO_S)
        if call is not None:
            call.cancel()
