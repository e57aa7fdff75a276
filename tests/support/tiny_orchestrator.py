"""The orchestrator's end of the wire and nothing else: real gRPC, real mTLS, plans pushed by hand.

It has no rounds and no ledger. Tests of the site agent drive it, so that what a site does on the wire
is tested against the protocol rather than against the orchestrator of the day.
"""

from __future__ import annotations

import queue
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import grpc

from orchestrator.site_server import SITE_OPTIONS
from protos import identity
from protos.chunks import ChunkFile, read_chunks
from protos.contribution import Header
from protos.errors import NotEnrolled, TokenUsed
from protos.manifest import Index, Manifest
from protos.plan import Plan
from protos.rpc import ErrorInterceptor
from protos.v1 import common_pb2, site_pb2, site_pb2_grpc

LIMIT_S = 60.0


class TinyOrchestrator(site_pb2_grpc.ControlServicer, site_pb2_grpc.BulkServicer):
    def __init__(
        self, folder: Path, federation: str = "tiny", host: str = "127.0.0.1", beat_s: float = 0.2
    ) -> None:
        self.folder, self.federation, self.host, self.beat_s = folder, federation, host, beat_s
        folder.mkdir(parents=True, exist_ok=True)
        self.authority = identity.new_authority(federation)
        self.models: dict[str, tuple[Path, Manifest, Index]] = {}
        self.changed = threading.Condition()
        self.said: list[site_pb2.FromSite] = []
        self.heard: list[tuple[float, site_pb2.FromSite]] = []  # the same, and when
        self.streams: list[queue.SimpleQueue[site_pb2.ToSite | None]] = []
        self.used: set[str] = set()
        self.revoked: set[str] = set()
        self.turned_away = 0
        self.fetches: list[list[int]] = []
        self.uploads: list[list[int]] = []
        self.contributions: dict[str, tuple[Header, bytes, Index, Path]] = {}
        self.heads: dict[str, Index] = {}
        self.break_upload_after: int | None = None
        self.break_fetch_after: int | None = None
        self.verdict: Any = common_pb2.Answer.COUNTED
        self.answers: dict[str, tuple[Any, str]] = {}  # to plans, where others than `verdict`
        self.turn_bytes = self.small_bytes = 0
        self.put_off: list[str] = []  # errors of the next answers that have no verdict
        self.hang_up = False  # the stream ends instead of an answer, once
        self.whole: list[str] = []  # plans of the contributions that came in one message
        self.turn = threading.Event()  # with turn_bytes: contributions wait for it
        self.out_of_turn = threading.Event()
        self.server: grpc.Server | None = None
        self.port = 0

    # -- life ----------------------------------------------------------------------------------

    def start(self) -> None:
        key = identity.new_key()
        name = identity.Identity(self.federation, "orchestrator", "orchestrator")
        hosts = ("localhost", self.host)
        leaf = identity.issue(self.authority, key.public_key(), name, timedelta(days=1), hosts)
        credentials = grpc.ssl_server_credentials(
            [(identity.key_pem(key), identity.certificate_pem(leaf))],
            identity.certificate_pem(self.authority[1]),
            require_client_auth=True,
        )
        self.server = grpc.server(
            ThreadPoolExecutor(16),
            options=[("grpc.so_reuseport", 0), *SITE_OPTIONS],
            interceptors=[ErrorInterceptor()],
        )
        site_pb2_grpc.add_ControlServicer_to_server(self, self.server)
        site_pb2_grpc.add_BulkServicer_to_server(self, self.server)
        deadline = monotonic() + LIMIT_S
        while True:  # after a restart the old port may take a moment
            try:
                self.port = self.server.add_secure_port(f"{self.host}:{self.port}", credentials)
                break
            except RuntimeError:
                if monotonic() > deadline:
                    raise
        self.server.start()

    def stop(self) -> None:
        # The server first: a site whose stream ended earlier would attach again to what goes away.
        if self.server is not None:
            self.server.stop(0).wait()
            self.server = None
        with self.changed:
            for stream in self.streams:
                stream.put(None)
            self.streams.clear()

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def invite(self, site: str) -> str:
        key = identity.new_key()
        name = identity.Identity(self.federation, "bootstrap", site)
        leaf = identity.issue(self.authority, key.public_key(), name, timedelta(hours=1))
        return identity.JoinToken(
            self.address,
            identity.certificate_pem(self.authority[1]),
            identity.certificate_pem(leaf),
            identity.key_pem(key),
        ).encode()

    # -- for tests -------------------------------------------------------------------------------

    def push(self, **message: Any) -> None:
        self.streams[-1].put(site_pb2.ToSite(**message))

    def offer(self, plan: Plan, base: site_pb2.SmallModel | None = None) -> None:
        self.push(plan=site_pb2.PlanOffer(plan=plan.encode(), base=base))

    def small(self, digest: str) -> site_pb2.SmallModel:
        """A published model as it goes out with a plan."""
        path, manifest, index = self.models[digest]
        head = site_pb2.ArtefactHead(index=index.encoded, manifest=manifest.encoded)
        return site_pb2.SmallModel(head=head, data=path.read_bytes())

    def until(self, done: Callable[[], Any], what: str = "it") -> Any:
        """Wait for something to become true; looked at after every message."""
        deadline = monotonic() + LIMIT_S
        with self.changed:
            while not (found := done()):
                if not self.changed.wait(deadline - monotonic()):
                    raise TimeoutError(f"{what} did not happen; said: {self.said[-5:]}")
            return found

    def attached(self) -> None:
        self.until(lambda: self.streams, "attach")

    def outcome(self, plan: Plan) -> site_pb2.Outcome:
        def find() -> site_pb2.Outcome | None:
            return next((m.outcome for m in self.said if m.outcome.plan_id == plan.id), None)

        found: site_pb2.Outcome = self.until(find, f"outcome of {plan.id}")
        return found

    def contribution(self, plan: Plan) -> tuple[Header, bytes, Index, Path]:
        """Header, signature, index and file of what came for a plan; fails early on an outcome."""

        def find() -> Any:
            for message in self.said:
                if message.outcome.plan_id == plan.id:
                    raise AssertionError(f"outcome instead: {message.outcome}")
            return next((c for c in self.contributions.values() if c[0].plan_id == plan.id), None)

        found: tuple[Header, bytes, Index, Path] = self.until(find, f"contribution to {plan.id}")
        return found

    def publish(self, path: Path, manifest: Manifest, index: Index) -> str:
        self.models[index.digest] = (path, manifest, index)
        return index.digest

    def _hear(self, message: site_pb2.FromSite) -> None:
        with self.changed:
            self.said.append(message)
            self.heard.append((monotonic(), message))
            self.changed.notify_all()

    # -- control ---------------------------------------------------------------------------------

    def _caller(self, context: grpc.ServicerContext) -> identity.Identity:
        pem = bytes(context.auth_context()["x509_pem_cert"][0])
        certificate = identity.load_certificate(pem)
        if identity.fingerprint(certificate) in self.revoked:
            with self.changed:
                self.turned_away += 1
                self.changed.notify_all()
            raise NotEnrolled("its certificate was revoked")
        return identity.identity_of(certificate)

    def Enroll(self, request: Any, context: Any) -> site_pb2.EnrollReply:  # noqa: N802
        caller = self._caller(context)
        if caller.role == "bootstrap":
            if caller.name in self.used:
                raise TokenUsed("join token: it was used before; ask the operator for a new one")
            self.used.add(caller.name)
        key = identity.requested_key(request.signing_request)
        name = identity.Identity(self.federation, "site", caller.name)
        leaf = identity.issue(self.authority, key, name, timedelta(days=90))
        return site_pb2.EnrollReply(
            certificate=identity.certificate_pem(leaf),
            authority=identity.certificate_pem(self.authority[1]),
            site=caller.name,
        )

    def Attach(self, request_iterator: Any, context: Any) -> Iterator[site_pb2.ToSite]:  # noqa: N802
        self._caller(context)
        hello = next(request_iterator)
        assert hello.WhichOneof("kind") == "hello"
        outgoing: queue.SimpleQueue[site_pb2.ToSite | None] = queue.SimpleQueue()
        welcome = site_pb2.Welcome(
            federation=self.federation,
            protocol=1,
            heartbeat_s=self.beat_s,
            turn_bytes=self.turn_bytes,
            small_bytes=self.small_bytes,
        )
        outgoing.put(site_pb2.ToSite(welcome=welcome))

        def read() -> None:
            try:
                for message in request_iterator:
                    self._hear(message)
                    if message.WhichOneof("kind") == "contribution":
                        answer = self._whole(message.contribution)
                        outgoing.put(answer and site_pb2.ToSite(answer=answer))
                    if message.heartbeat.sequence:
                        outgoing.put(site_pb2.ToSite(heartbeat=message.heartbeat))
            except grpc.RpcError:
                pass
            outgoing.put(None)

        threading.Thread(target=read, daemon=True).start()
        with self.changed:
            if not context.is_active():  # of a server that was stopped since
                return
            self.said.append(hello)
            self.streams.append(outgoing)
            self.changed.notify_all()
        while (message := outgoing.get()) is not None:
            yield message

    def _whole(self, came: site_pb2.SmallContribution) -> common_pb2.Answer | None:
        header = Header.decode(came.head.header)
        self.whole.append(header.plan_id)
        if self.hang_up:
            self.hang_up = False
            return None
        if self.put_off:
            error = self.put_off.pop(0)
            return common_pb2.Answer(error=error, message="not now", contribution=header.digest)
        kept = self.folder / f"{header.digest}.payload"
        kept.write_bytes(came.data)
        self._keep(header, came.head, kept)
        return self._answer(header)

    def _answer(self, header: Header) -> common_pb2.Answer:
        verdict, plan_id = self.answers.get(header.plan_id, (self.verdict, header.plan_id))
        return common_pb2.Answer(verdict=verdict, plan_id=plan_id, contribution=header.digest)

    def _keep(self, header: Header, head: site_pb2.ContributionHead, payload: Path) -> None:
        entry = (header, head.signature, Index.decode(head.index), payload)
        with self.changed:
            self.contributions[header.digest] = entry
            self.changed.notify_all()

    # -- bulk ------------------------------------------------------------------------------------

    def FetchModel(self, request: Any, context: Any) -> Iterator[site_pb2.FetchReply]:  # noqa: N802
        self._caller(context)
        path, manifest, index = self.models[request.digest]
        sent: list[int] = []
        self.fetches.append(sent)
        head = site_pb2.ArtefactHead(index=index.encoded, manifest=manifest.encoded)
        yield site_pb2.FetchReply(head=head)
        ranges = [(r.first, r.end) for r in request.missing]
        for number, data in read_chunks(path, index, ranges):
            if self.break_fetch_after is not None and len(sent) >= self.break_fetch_after:
                self.break_fetch_after = None
                context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
            sent.append(number)
            yield site_pb2.FetchReply(chunk=common_pb2.Chunk(number=number, data=data))

    def _spool(self, index: Index) -> ChunkFile:
        return ChunkFile(self.folder / index.digest, index)

    def Contribute(self, request_iterator: Any, context: Any) -> common_pb2.Answer:  # noqa: N802
        self._caller(context)
        head = next(request_iterator).head
        header, index = Header.decode(head.header), Index.decode(head.index)
        came: list[int] = []
        self.uploads.append(came)
        self.heads[header.plan_id] = index
        if self.turn_bytes:
            request_iterator = self._in_turn(request_iterator, context)
        with self._spool(index) as file:
            for message in request_iterator:
                if self.break_upload_after is not None and len(came) >= self.break_upload_after:
                    self.break_upload_after = None
                    file.close()
                    with self.changed:
                        self.changed.notify_all()
                    context.abort(grpc.StatusCode.UNAVAILABLE, "broken on purpose")
                file.write(message.chunk.number, message.chunk.data)
                came.append(message.chunk.number)
            file.finish()
        kept = self.folder / f"{header.digest}.payload"
        shutil.move(self.folder / index.digest, kept)
        self._keep(header, head, kept)
        return self._answer(header)

    def _in_turn(self, said: Any, context: Any) -> Iterator[Any]:
        """The messages; none should come before the initial metadata, which come with the turn."""
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def read() -> None:
            with suppress(grpc.RpcError):  # the line was cut
                for message in said:
                    if not self.turn.is_set():
                        self.out_of_turn.set()
                    messages.put(message)
            messages.put(None)

        threading.Thread(target=read, daemon=True).start()
        self.turn.wait(LIMIT_S)
        context.send_initial_metadata(())
        return iter(messages.get, None)

    def ContributionStatus(self, request: Any, context: Any) -> site_pb2.StatusReply:  # noqa: N802
        self._caller(context)
        index = self.heads.get(request.plan_id)
        if index is None:
            return site_pb2.StatusReply(known=False)
        with self._spool(index) as file:
            missing = [common_pb2.ChunkRange(first=a, end=b) for a, b in file.missing()]
        return site_pb2.StatusReply(known=True, missing=missing)
