"""Empties the outbox: offers every finished contribution until it has a final answer.

A small one goes out in one message on the control stream, and its answer comes back on it; every other
by a call of its own, resumable.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Protocol

import grpc

from protos.bulk import BulkStub, chunk_message
from protos.chunks import read_chunks
from protos.digest import digest
from protos.errors import DataCorrupt, FarflungError, ManifestInvalid, Unavailable, by_name
from protos.faults import reach
from protos.hang_up import hang_up
from protos.rpc import from_rpc_error
from protos.v1 import common_pb2, site_pb2
from site_agent.link.journal import Journal
from site_agent.link.outbox import Entry, Outbox, Verdict
from site_agent.link.plans import order_of
from site_agent.link.wire import Wire, backoff

STATUS_TIMEOUT_S = 30.0
ASK_AGAIN_S = 1.0
TELL_S = 0.1
"""How far a contribution is, is told at most this often."""

VERDICTS: dict[int, Verdict] = {
    common_pb2.Answer.COUNTED: "counted",
    common_pb2.Answer.LATE: "late",
    common_pb2.Answer.REFUSED: "refused",
}


class Ears(Protocol):
    """Who hears how the sending goes.

    Attributes:
        turn: Held while an answer is dealt with; see `OpenPlans`.
    """

    turn: threading.RLock

    def sending(self, entry: Entry, done: int, planned: int) -> None:
        """Bytes of a contribution left."""

    def answered(self, entry: Entry, verdict: Verdict, error: str, message: str) -> None:
        """A contribution has its final answer."""

    def closed(self, plan_id: str, work_digest: str = "") -> None:
        """A plan has its answer, unless it asks for other work than was answered."""

    def unanswered(self, plan_id: str) -> None:
        """A contribution was meant for this plan too, but was answered for another attempt."""

    def unsendable(self, entry: Entry, error: FarflungError) -> None:
        """A contribution's payload is damaged here; it was removed."""


class Sender:
    """See the module.

    Args:
        wire: Connections.
        say: Says something on the control stream; whether there is one.
        outbox: What is to be sent.
        ears: Who hears of it.
        journal: Log.
    """

    def __init__(
        self,
        wire: Wire,
        say: Callable[[site_pb2.FromSite], bool],
        outbox: Outbox,
        ears: Ears,
        journal: Journal,
    ) -> None:
        self._wire, self._say = wire, say
        self._outbox, self._ears, self._journal = outbox, ears, journal
        self._condition = threading.Condition()
        self._stopped = False
        self._attached = False
        self._may_move = True
        self._turn_bytes = self._small_bytes = 0
        self._streams = 0  # control streams that began or ended so far
        self._put_off: dict[str, common_pb2.Answer] = {}  # answers without a verdict
        self._channel: grpc.Channel | None = None
        self._call: grpc.Call | None = None
        self._not_before: dict[str, float] = {}
        self._waits: dict[str, Iterator[float]] = {}
        self._unclear: dict[str, float] = {}  # plans that are to be asked about, and when
        self.sent_bytes = self._sent_before = 0

    busy = False
    """Whether an upload is under way."""

    # -- from other threads ----------------------------------------------------------------------

    def nudge(self, contribution: str = "") -> None:
        """Something is new in the outbox, or is to be sent now that was to wait."""
        with self._condition:
            self._not_before.pop(contribution, None)
            self._waits.pop(contribution, None)
            self._condition.notify_all()

    def attached(self, welcome: site_pb2.Welcome | None) -> None:
        """The control stream is there, or not (None); nothing is sent without it."""
        with self._condition:
            self._attached = welcome is not None
            self._streams += 1
            self._turn_bytes = welcome.turn_bytes if welcome is not None else 0
            self._small_bytes = welcome.small_bytes if welcome is not None else 0
            if welcome is not None:
                self._not_before.clear()
                self._waits.clear()
            self._condition.notify_all()

    def allowed(self, allowed: bool) -> None:
        """Whether contributions may move now; one that is on its way stops, and goes on later."""
        with self._condition:
            self._may_move = allowed
            if allowed:
                self._not_before.clear()
                self._waits.clear()
            self._condition.notify_all()
        if not allowed:
            self.reconnect()

    def reconnect(self) -> None:
        """Use a new connection from now on (new keys, another cap, or an end)."""
        with self._condition:
            channel, self._channel = self._channel, None
        if channel is not None:
            hang_up(channel)

    def ask(self, plans: Iterable[str]) -> None:
        """Ask how it stands with plans whose work was answered for another attempt."""
        with self._condition:
            self._unclear.update(dict.fromkeys(plans, monotonic()))
            self._condition.notify_all()

    def stop(self) -> None:
        """End the thread; what is not sent stays in the outbox."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self.reconnect()

    def apply(self, answer: common_pb2.Answer) -> None:
        """An answer that came on the control stream."""
        entry = self._outbox.find(answer.contribution, answer.plan_id)
        if entry is None:
            return
        if answer.verdict in VERDICTS:
            self._settle(entry, answer)
            return
        with self._condition:
            self._put_off[entry.digest] = answer
            self._condition.notify_all()

    # -- the thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Send until stopped."""
        while (entry := self._next()) is not None:
            if isinstance(entry, str):
                self._clarify(entry)
                continue
            try:
                self._send(entry)
            except Unavailable as error:
                self.reconnect()
                self._later(entry, error)
            except (DataCorrupt, ManifestInvalid) as error:
                self._outbox.discard(entry)
                self._ears.unsendable(entry, error)
            except FarflungError as error:
                self._later(entry, error)
            except OSError as error:
                self._outbox.discard(entry)
                self._ears.unsendable(entry, DataCorrupt(f"the outbox can't be read: {error}"))

    def _next(self) -> Entry | str | None:
        """The next contribution or unclear plan whose time has come; None at the end."""
        with self._condition:
            while not self._stopped:
                may_send = self._attached and self._may_move
                now, soonest = monotonic(), None
                for plan_id, due in self._unclear.items() if may_send else ():
                    if due <= now:
                        del self._unclear[plan_id]
                        return plan_id
                    soonest = due if soonest is None else min(soonest, due)
                for entry in self._outbox.waiting() if may_send else ():
                    due = self._not_before.get(entry.digest, now)
                    if due <= now:
                        return entry
                    soonest = due if soonest is None else min(soonest, due)
                self._condition.wait(None if soonest is None else soonest - now)
            return None

    def _clarify(self, plan_id: str) -> None:
        """Ask how it stands with a plan; if it can't be asked now, a little later."""
        request = site_pb2.StatusRequest(plan_id=plan_id)
        try:
            stub = BulkStub(self._open())
            status = stub.ContributionStatus(request, timeout=STATUS_TIMEOUT_S)
        except (grpc.RpcError, ValueError, Unavailable):
            self.reconnect()
            with self._condition:
                self._unclear[plan_id] = monotonic() + ASK_AGAIN_S
            return
        if status.HasField("answer"):
            self._ears.closed(plan_id)
        else:
            self._ears.unanswered(plan_id)

    def _later(self, entry: Entry, error: FarflungError) -> None:
        if (
            self.sent_bytes > self._sent_before
        ):  # a line that is cut often, but does carry something
            self._waits.pop(entry.digest, None)
        self._sent_before = self.sent_bytes
        wait = next(self._waits.setdefault(entry.digest, backoff()))
        self._journal.warning(
            "sending interrupted",
            contribution=entry.digest,
            reason=error.message,
            again_in_s=round(wait, 2),
        )
        with self._condition:
            self._not_before[entry.digest] = monotonic() + wait

    def _send(self, entry: Entry) -> None:
        if entry.index.nbytes <= self._small_bytes:
            self._send_small(entry)
        else:
            self._upload(entry)

    def _send_small(self, entry: Entry) -> None:
        """Say it on the control stream, and wait for the answer or the end of the stream."""
        data = entry.payload.read_bytes()
        if tuple(digest(part) for part in (data,) if part) != entry.index.chunks:
            raise DataCorrupt("the payload is damaged in the outbox")
        with self._condition:
            stream = self._streams
            self._put_off.pop(entry.digest, None)
        entry.fresh = False
        self._ears.sending(entry, 0, len(data))
        reach("contribute.saying")
        said = site_pb2.SmallContribution(head=_head(entry), data=data)
        if not self._say(site_pb2.FromSite(contribution=said)):
            raise Unavailable("the control stream is gone")
        self.sent_bytes += len(data)
        reach("contribute.said")
        with self._condition:
            self._condition.wait_for(
                lambda: (
                    entry.verdict is not None
                    or entry.digest in self._put_off
                    or stream != self._streams
                    or self._stopped
                )
            )
            put_off = self._put_off.pop(entry.digest, None)
        if entry.verdict is not None:
            return
        if put_off is not None:
            raise _theirs(by_name(put_off.error)(put_off.message))
        raise Unavailable("the control stream ended before the answer came")

    def _upload(self, entry: Entry) -> None:
        stub = BulkStub(self._open())
        broken: list[FarflungError | OSError] = []
        try:
            missing = None
            if not entry.fresh:
                request = site_pb2.StatusRequest(plan_id=entry.header.plan_id)
                status = stub.ContributionStatus(request, timeout=STATUS_TIMEOUT_S)
                reach("contribute.status.heard")
                if status.HasField("answer") and self._is_ours(status.answer, entry):
                    self._settle(entry, status.answer)
                    return
                missing = [(r.first, r.end) for r in status.missing] if status.known else None
            entry.fresh = False
            turn = threading.Event()
            messages = _watched(self._messages(entry, missing, turn), broken)
            if 0 < self._turn_bytes <= entry.index.nbytes:
                call = stub.Contribute.future(messages)
                call.initial_metadata()  # comes with the turn, or with the end of the call
                turn.set()
                answer = call.result()
            else:
                turn.set()
                answer = stub.Contribute(messages)
        except ValueError:
            raise Unavailable("another thread closed the connection") from None
        except grpc.RpcError as error:
            # What fails in the messages' iterator, gRPC only reports as a call that broke.
            raise (broken[0] if broken else _theirs(from_rpc_error(error))) from None
        finally:
            self.busy = False
        self._settle(entry, answer)

    @staticmethod
    def _is_ours(answer: common_pb2.Answer, entry: Entry) -> bool:
        """Whether an answer to the plan is one to this contribution."""
        return answer.contribution in ("", entry.digest)

    def _open(self) -> grpc.Channel:
        with self._condition:
            if not self._may_move:
                raise Unavailable("no window of [network] in site.toml is open")
            if self._channel is None:
                self._channel = self._wire.open_bulk()
            return self._channel

    def _messages(
        self, entry: Entry, missing: list[tuple[int, int]] | None, turn: threading.Event
    ) -> Iterator[site_pb2.ContributeRequest | bytes]:
        """The head, then what is missing there; everything if it never heard of it (None)."""
        yield site_pb2.ContributeRequest(head=_head(entry))
        reach("contribute.head.sent")
        ranges = [(0, len(entry.index.chunks))] if missing is None else missing
        planned = sum(
            stop - start
            for first, end in ranges
            for start, stop in map(entry.index.span, range(first, end))
        )
        done, told = 0, monotonic()
        self._ears.sending(entry, done, planned)
        if not ranges or not entry.index.chunks:
            return
        turn.wait()
        self.busy = True
        for number, data in read_chunks(entry.payload, entry.index, ranges):
            # What is sent again may be asked for because it is damaged here.
            if missing is not None and digest(data) != entry.index.chunks[number]:
                raise DataCorrupt(f"chunk {number} of the payload is damaged in the outbox")
            yield chunk_message(number, data)
            reach("contribute.chunk.sent")
            done += len(data)
            self.sent_bytes += len(data)
            if monotonic() - told >= TELL_S:
                told = monotonic()
                self._ears.sending(entry, done, planned)
        reach("contribute.sent")
        self.busy = False  # what follows is the orchestrator's time, not the line's

    def _settle(self, entry: Entry, answer: common_pb2.Answer) -> None:
        verdict = VERDICTS.get(answer.verdict)
        if verdict is None:
            raise Unavailable("the orchestrator gave an answer without a verdict")
        reach("contribute.answered")
        with self._ears.turn:
            self._outbox.answer(entry, verdict)
            reach("contribute.verdict.kept")
            self._ears.answered(entry, verdict, answer.error, answer.message)
            answered_for = answer.plan_id or entry.header.plan_id
            own = answered_for == entry.header.plan_id
            self._ears.closed(answered_for, entry.header.work_digest if own else "")
            reach("contribute.settled")
            # An answer for one attempt, or round, says that those before it are over.
            for plan_id in (p for p in entry.plans if order_of(p) < order_of(answered_for)):
                self._ears.closed(plan_id)
            self.ask(p for p in entry.plans if order_of(p) > order_of(answered_for))


def _theirs(error: FarflungError) -> FarflungError:
    """An error of the other end. What is damaged there is not damaged here."""
    damaged = isinstance(error, DataCorrupt | ManifestInvalid)
    return FarflungError(error.message) if damaged else error


def _head(entry: Entry) -> site_pb2.ContributionHead:
    return site_pb2.ContributionHead(
        header=entry.encoded, signature=entry.signature, index=entry.index.encoded
    )


def _watched(
    messages: Iterator[site_pb2.ContributeRequest | bytes], broken: list[FarflungError | OSError]
) -> Iterator[site_pb2.ContributeRequest | bytes]:
    try:
        yield from messages
    except (FarflungError, OSError) as error:
        broken.append(error)
        raise
