"""The two services that sites reach. Handlers translate, write and hash; the round is elsewhere."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import grpc

from orchestrator.admission import LARGE_BYTES, Admission
from orchestrator.doorkeeper import Caller, Doorkeeper
from orchestrator.fanout import Fanout
from orchestrator.heads import Announced
from orchestrator.home import Home
from orchestrator.ledger import Ledger
from orchestrator.reception import Reception
from orchestrator.recorder import Hearing, Recorder
from orchestrator.sessions import Session, Sessions
from orchestrator.small import SMALL_BYTES
from orchestrator.store import Store
from orchestrator.views import WorkState
from protos import __version__
from protos.bulk import Chunk, Incoming
from protos.digest import digest
from protos.errors import (
    Conflict,
    FarflungError,
    InvalidInput,
    NotEnrolled,
    TokenUsed,
    reference_id,
)
from protos.faults import reach
from protos.identity import (
    SITE_LIFE,
    Identity,
    certificate_pem,
    fingerprint,
    issue,
    load_certificate,
    requested_key,
)
from protos.plan import Plan
from protos.v1 import common_pb2, site_pb2, site_pb2_grpc

log = logging.getLogger(__name__)

PROTOCOL = 1

PLANS_HEARD = 64
"""Of those that a site says it is still at: each is looked up, and it may name as many as it likes."""

STATES: dict[int, WorkState] = {
    site_pb2.Progress.WAITING: "waiting",
    site_pb2.Progress.PREPARING: "preparing",
    site_pb2.Progress.FETCHING: "fetching",
    site_pb2.Progress.TRAINING: "training",
    site_pb2.Progress.ENCODING: "encoding",
    site_pb2.Progress.SENDING: "sending",
}


class Listener(Hearing, Protocol):
    """Who wants to know what the sites do: the round under way."""

    def progress(self, site: str, plan_id: str, state: WorkState, said: site_pb2.Progress) -> None:
        """A site said where it is."""

    def left_run(self, site: str, run: str) -> None:
        """A site takes no further part in a run."""

    def troubled(self, site: str, text: str) -> None:
        """A site is turned away."""


class ControlService(site_pb2_grpc.ControlServicer):
    """Enrol, and the long-lived streams.

    Args:
        bulk: What sites are told of where models and contributions go; see ``Welcome.bulk``.
        reception: Takes contributions that come on the stream; None if none shall.
    """

    def __init__(
        self,
        home: Home,
        ledger: Ledger,
        doorkeeper: Doorkeeper,
        sessions: Sessions,
        listener: Listener,
        heartbeat_s: float,
        bulk: str = "",
        reception: Reception | None = None,
    ) -> None:
        self._home, self._ledger, self._doorkeeper = home, ledger, doorkeeper
        self._sessions, self._listener = sessions, listener
        self._heartbeat_s, self._bulk, self._reception = heartbeat_s, bulk, reception
        self._authority = home.authority()
        self._enrolling = threading.Lock()

    def Enroll(
        self, request: site_pb2.EnrollRequest, context: grpc.ServicerContext
    ) -> site_pb2.EnrollReply:
        """A certificate: for a join token's bootstrap certificate once, or to renew a site's own."""
        caller = self._doorkeeper.caller(context)
        key = requested_key(request.signing_request)
        federation = caller.identity.federation
        with self._enrolling:
            if caller.identity.role == "bootstrap":
                token = self._ledger.token(caller.identity.name)
                if token is None:
                    raise TokenUsed("join token: unknown here; ask the operator for a new one")
                if token.used is not None and token.fingerprint:
                    reply = self._again(token.fingerprint, token.site, request.signing_request)
                    if reply is not None:
                        return reply
                site = token.site
            elif caller.identity.role == "site":
                site = self._doorkeeper.site(context).identity.name
            else:
                raise NotEnrolled("certificate: an orchestrator does not enrol")
            certificate = issue(self._authority, key, Identity(federation, "site", site), SITE_LIFE)
            reach("enrol.issued")
            pem, mark = certificate_pem(certificate), fingerprint(certificate)
            expires = certificate.not_valid_after_utc.timestamp()
            if caller.identity.role == "bootstrap":
                self._ledger.use_token(
                    caller.identity.name,
                    fingerprint=mark,
                    certificate_pem=pem,
                    expires=expires,
                    site=site,
                )
            else:
                self._ledger.renew(site, caller.fingerprint, mark, pem, expires)
        reach("enrol.recorded")
        log.info("site %s enrolled", site, extra={"site": site})
        return self._reply(pem, site)

    def _again(self, mark: str, site: str, signing_request: bytes) -> site_pb2.EnrollReply | None:
        """The same answer for the same key, where the first one got lost on the way."""
        known = self._ledger.certificate(mark)
        if known is None:
            return None
        certified = load_certificate(known.pem).public_key()
        return self._reply(known.pem, site) if certified == requested_key(signing_request) else None

    def _reply(self, pem: bytes, site: str) -> site_pb2.EnrollReply:
        authority = certificate_pem(self._authority[1])
        return site_pb2.EnrollReply(certificate=pem, authority=authority, site=site)

    def Attach(
        self, request_iterator: Iterator[site_pb2.FromSite], context: grpc.ServicerContext
    ) -> Iterator[site_pb2.ToSite]:
        """One site's stream: what it says is read in a thread of its own, what it is told is yielded."""
        caller = self._doorkeeper.caller(context)
        try:
            session = self._welcomed(caller, request_iterator)
        except (NotEnrolled, InvalidInput, Conflict) as error:
            if caller.identity.role == "site":
                self._listener.troubled(caller.identity.name, error.message)
            raise
        reader = threading.Thread(
            target=self._read,
            args=(session, caller, request_iterator),
            name=f"site-{session.site}",
        )
        reader.daemon = True
        reader.start()
        for row in self._ledger.open_plans(session.site):
            session.send(site_pb2.ToSite(plan=site_pb2.PlanOffer(plan=row.plan)))
        for plan_id in self._not_wanted(session):
            session.send(
                site_pb2.ToSite(cancel=site_pb2.Cancel(plan_id=plan_id, reason="its run has ended"))
            )
        reach("attach.offered")
        context.add_callback(session.end)
        try:
            yield from session.outgoing()
        finally:
            self._sessions.detach(session)

    def _welcomed(self, caller: Caller, request_iterator: Iterator[site_pb2.FromSite]) -> Session:
        """The session of a site that is let in."""
        self._doorkeeper.admit(caller)
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("kind") != "hello":
            raise InvalidInput("stream: the first message must be hello")
        hello = first.hello
        reach("attach.heard")
        if hello.protocol != PROTOCOL:
            raise InvalidInput(
                f"site {caller.identity.name}: its agent ({hello.version}) speaks protocol "
                f"{hello.protocol}, this orchestrator ({__version__}) speaks {PROTOCOL}; "
                "upgrade the older one"
            )
        session = Session(caller.identity.name, caller.fingerprint, hello, paused=hello.paused)
        session.send(
            site_pb2.ToSite(
                welcome=site_pb2.Welcome(
                    federation=caller.identity.federation,
                    version=__version__,
                    protocol=PROTOCOL,
                    heartbeat_s=self._heartbeat_s,
                    bulk=self._bulk,
                    turn_bytes=LARGE_BYTES,
                    small_bytes=SMALL_BYTES if self._reception is not None else 0,
                )
            )
        )
        reach("attach.welcomed")
        self._sessions.attach(session)
        return session

    def _not_wanted(self, session: Session) -> list[str]:
        """Plans that a site is still at, whose run ended while it was away."""
        named = session.hello.plans[:PLANS_HEARD]
        rows = (self._ledger.plan(plan_id, session.site) for plan_id in named)
        ended = ("finished", "stopped", "failed")
        return [
            row.id for row in rows if row is not None and self._ledger.run(row.run).state in ended
        ]

    def _read(self, session: Session, caller: Caller, said: Iterator[site_pb2.FromSite]) -> None:
        try:
            for message in said:
                session.last_seen = math.inf  # while it is listened to, it is not silent
                reach("stream.heard")
                if message.WhichOneof("kind") == "contribution":
                    answer = self._take(caller, message.contribution)
                    reach("stream.answering")
                    session.send(site_pb2.ToSite(answer=answer))
                    reach("stream.answered")
                else:
                    self._hear(session, message)
                session.last_seen = time.monotonic()
        except grpc.RpcError:
            pass  # the stream broke; its end is handled where it is written
        except Exception:
            log.exception("site %s: its stream is ended", session.site)
        finally:
            session.end()

    def _take(self, caller: Caller, said: site_pb2.SmallContribution) -> common_pb2.Answer:
        """What came in one message; an answer without a verdict has it sent again."""
        try:
            self._doorkeeper.admit(caller)
            if self._reception is None or len(said.data) > SMALL_BYTES:
                raise InvalidInput("contribution: it has to be sent by a call of Bulk")
            return self._reception.take_whole(caller, said.head, said.data)
        except FarflungError as error:
            name, text = type(error).__name__, error.message
        except Exception as error:
            reference = reference_id()
            log.exception("contribution failed, reference %s", reference, exc_info=error)
            name, text = (
                "FarflungError",
                f"an internal error; the log has its cause under {reference}",
            )
        return common_pb2.Answer(error=name, message=text, contribution=digest(said.head.header))

    def _hear(self, session: Session, message: site_pb2.FromSite) -> None:
        kind, site = message.WhichOneof("kind"), session.site
        if kind == "heartbeat":
            session.paused = message.heartbeat.paused
            if message.heartbeat.sequence:
                session.send(site_pb2.ToSite(heartbeat=message.heartbeat))
        elif kind == "progress":
            said = message.progress
            state = STATES.get(said.state)
            if state is not None:
                self._listener.progress(site, said.plan_id, state, said)
        elif kind == "outcome":
            outcome = message.outcome
            row = self._ledger.plan(outcome.plan_id, site)
            if row is not None and not row.answer:
                self._ledger.answer_plan(
                    outcome.plan_id, site, "failed", outcome.error[:64], outcome.message[:2000]
                )
                reach("outcome.recorded")
                self._listener.failed(
                    site, outcome.plan_id, outcome.error[:64], outcome.message[:2000], "failed"
                )
        elif kind == "leave":
            self._listener.left_run(site, message.leave.run)


class BulkService(site_pb2_grpc.BulkServicer):
    """Models down, contributions up; in the daemon and in every gateway."""

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        doorkeeper: Doorkeeper,
        reception: Reception,
        recorder: Recorder,
    ) -> None:
        self._ledger, self._store, self._doorkeeper = ledger, store, doorkeeper
        self._reception, self._recorder = reception, recorder
        self._fanout, self._admission = Fanout(), Admission()

    def FetchModel(
        self, request: site_pb2.FetchRequest, context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """The index, the manifest, and the missing chunks of an artefact of an open plan."""
        site = self._doorkeeper.site(context).identity.name
        named = set[str]()
        for row in self._ledger.open_plans(site):
            plan = Plan.decode(row.plan)
            named |= {plan.base, plan.frozen, *plan.accepts}
        if not request.digest or request.digest not in named:
            raise NotEnrolled(
                f"site {site}: no open plan of it names the model {request.digest[:12]}", site=site
            )
        index = self._store.index(request.digest)
        reach("serve.asked")
        manifest = self._store.manifest(index.manifest)
        head = site_pb2.ArtefactHead(index=index.encoded, manifest=manifest.encoded)
        yield site_pb2.FetchReply(head=head)
        reach("serve.head.sent")
        ranges = [(r.first, r.end) for r in request.missing]
        if not index.chunks:
            return
        with self._admission.place(index.nbytes, context.is_active) as carried:
            path = self._store.path(request.digest)
            for nbytes, frame in self._fanout.frames(path, index, ranges):
                yield frame
                carried(nbytes)
                self._recorder.moved(site, received=nbytes)
                reach("serve.chunk.sent")

    def Contribute(
        self,
        request_iterator: Iterator[Incoming],
        context: grpc.ServicerContext,
    ) -> common_pb2.Answer:
        """One contribution; the answer is final."""
        caller = self._doorkeeper.site(context)
        first = next(request_iterator, None)
        if not isinstance(first, site_pb2.ContributeRequest) or not first.HasField("head"):
            raise InvalidInput("contribution: the first message must be the head")
        reach("contribute.heard")
        chunks = (m for m in request_iterator if isinstance(m, Chunk))

        @contextmanager
        def in_turn(announced: Announced) -> Iterator[Iterator[Chunk]]:
            nbytes = announced.index.nbytes
            with self._admission.place(nbytes, context.is_active) as carried:
                yield _asked_for(chunks, nbytes, context, carried)

        return self._reception.take(caller, first.head, in_turn)

    def ContributionStatus(
        self, request: site_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> site_pb2.StatusReply:
        """What is missing of the caller's contribution, or its final answer."""
        return self._reception.status(self._doorkeeper.site(context), request.plan_id)


def _asked_for(
    chunks: Iterator[Chunk],
    nbytes: int,
    context: grpc.ServicerContext,
    carried: Callable[[int], None],
) -> Iterator[Chunk]:
    """The chunks; those of a large contribution come once they are asked for, see ``Welcome``."""
    if nbytes >= LARGE_BYTES:
        context.send_initial_metadata(())
    for chunk in chunks:
        carried(len(chunk.data))
        yield chunk
