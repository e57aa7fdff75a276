"""Empties the outbox: offers every finished contribution until it has a final answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from time import monotonic
from typing import Protocol

import grpc

from protos.bulk import BulkStub, chunk_message
from protos.chunks import read_chunks
from protos.digest import digest
from protos.errors import DataCorrupt, FarflungError, ManifestInvalid, Unavailable
from protos.rpc import from_rpc_error
from protos.v1 import common_pb2, site_pb2
from site_agent.link.journal import Journal
from site_agent.link.outbox import Entry, Outbox, Verdict
from site_agent.link.wire import Wire, backoff

STATUS_TIMEOUT_S = 30.0
TELL_S = 0.1
"""How far a contribution is, is told at most this often."""

VERDICTS: dict[int, Verdict] = {
    common_pb2.Answer.COUNTED: "counted",
    common_pb2.Answer.LATE: "late",
    common_pb2.Answer.REFUSED: "refused",
}


class Ears(Protocol):
    """Who hears how the sending goes."""

    def sending(self, entry: Entry, done: int, planned: int) -> None:
        """Bytes of a contribution left."""

    def answered(self, entry: Entry, verdict: Verdict, error: str, message: str) -> None:
        """A contribution has its final answer."""

    def closed(self, plan_id: str) -> None:
        """A plan has its answer."""

    def unanswered(self, plan_id: str) -> None:
        """A contribution was meant for this plan too, but was answered for another attempt."""

    def unsendable(self, entry: Entry, error: FarflungError) -> None:
        """A contribution's payload is damaged here; it was removed."""


class Sender:
    """See the module.

    Args:
        wire: Connections.
        outbox: What is to be sent.
        ears: Who hears of it.
        journal: Log.
    """

    def __init__(self, wire: Wire, outbox: Outbox, ears: Ears, journal: Journal) -> None:
        self._wire, self._outbox, self._ears, self._journal = wire, outbox, ears, journal
        self._condition = threading.Condition()
        self._stopped = False
        self._attached = False
        self._may_move = True
        self._turn_bytes = 0
        self._channel: grpc.Channel | None = None
        self._call: grpc.Call | None = None
        self._not_before: dict[str, float] = {}
        self._waits: dict[str, Iterator[float]] = {}
        self._unclear: list[str] = []
        self.sent_bytes = self._sent_before = 0

    busy = False
    """Whether an upload is under way."""

    # -- from other threads ----------------------------------------------------------------------

    def nudge(self) -> None:
        """Something is new in the outbox."""
        with self._condition:
            self._condition.notify_all()

    def attached(self, attached: bool, turn_bytes: int = 0) -> None:
        """The control stream is there, or not; nothing is sent without it.

        Args:
            attached: Whether it is there.
            turn_bytes: See ``Welcome.turn_bytes``.
        """
        with self._condition:
            self._attached, self._turn_bytes = attached, turn_bytes
            if attached:
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
            channel.close()

    def stop(self) -> None:
        """End the thread; what is not sent stays in the outbox."""
        with self._condition:
            self._stopped = True
            self._condition.notify_all()
        self.reconnect()

    def apply(self, answer: common_pb2.Answer) -> None:
        """A final answer, from whichever stream it came."""
        entry = self._outbox.find(answer.contribution, answer.plan_id)
        if entry is not None and answer.verdict in VERDICTS:
            self._settle(entry, answer)

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
                if self._unclear and may_send:
                    return self._unclear.pop(0)
                now, soonest = monotonic(), None
                for entry in self._outbox.waiting() if may_send else ():
                    due = self._not_before.get(entry.digest, now)
                    if due <= now:
                        return entry
                    soonest = due if soonest is None else min(soonest, due)
                self._condition.wait(None if soonest is None else soonest - now)
            return None

    def _clarify(self, plan_id: str) -> None:
        """Ask how it stands with a plan; if it can't be asked now, its offer will come again."""
        request = site_pb2.StatusRequest(plan_id=plan_id)
        try:
            stub = BulkStub(self._open())
            status = stub.ContributionStatus(request, timeout=STATUS_TIMEOUT_S)
        except (grpc.RpcError, ValueError, Unavailable):
            self.reconnect()
            self._ears.closed(plan_id)
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
        stub = BulkStub(self._open())
        broken: list[FarflungError | OSError] = []
        try:
            missing = None
            if not entry.fresh:
                request = site_pb2.StatusRequest(plan_id=entry.header.plan_id)
                status = stub.ContributionStatus(request, timeout=STATUS_TIMEOUT_S)
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
            raise (broken[0] if broken else from_rpc_error(error)) from None
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
        yield site_pb2.ContributeRequest(
            head=site_pb2.ContributionHead(
                header=entry.encoded, signature=entry.signature, index=entry.index.encoded
            )
        )
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
            done += len(data)
            self.sent_bytes += len(data)
            if monotonic() - told >= TELL_S:
                told = monotonic()
                self._ears.sending(entry, done, planned)
        self.busy = False  # what follows is the orchestrator's time, not the line's

    def _settle(self, entry: Entry, answer: common_pb2.Answer) -> None:
        verdict = VERDICTS.get(answer.verdict)
        if verdict is None:
            raise Unavailable("the orchestrator gave an answer without a verdict")
        self._outbox.answer(entry, verdict)
        self._ears.answered(entry, verdict, answer.error, answer.message)
        answered_for = answer.plan_id or entry.header.plan_id
        self._ears.closed(answered_for)
        with self._condition:
            self._unclear += [p for p in entry.plans if p != answered_for]
            self._condition.notify_all()


def _watched(
    messages: Iterator[site_pb2.ContributeRequest | bytes], broken: list[FarflungError | OSError]
) -> Iterator[site_pb2.ContributeRequest | bytes]:
    try:
        yield from messages
    except (FarflungError, OSError) as error:
        broken.append(error)
        raise
