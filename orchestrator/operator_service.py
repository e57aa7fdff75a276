"""The operators' service: translates calls into the daemon's parts and views into JSON."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta

import grpc

from orchestrator import holding, retention
from orchestrator.exporting import exported
from orchestrator.launching import launch
from orchestrator.ledger import EventLog, Ledger, RoundRow
from orchestrator.replaying import replay
from orchestrator.rollback import roll_back
from orchestrator.rounds.engine import Engine
from orchestrator.runs import Runner
from orchestrator.sessions import Sessions
from orchestrator.verifying import verify_run
from orchestrator.viewing import Viewing
from orchestrator.views import Daemon, View
from protos.errors import Conflict, InvalidInput
from protos.identity import (
    Identity,
    JoinToken,
    certificate_pem,
    issue,
    key_pem,
    new_key,
)
from protos.v1 import operator_pb2, operator_pb2_grpc

SITE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
PART_BYTES = 1 << 20
STREAM_CHECK_S = 1.0


class OperatorService(operator_pb2_grpc.OperatorServicer):
    """What the command line and the page may ask."""

    def __init__(
        self,
        engine: Engine,
        runner: Runner,
        sessions: Sessions,
        viewing: Viewing,
        events: EventLog,
        status: Callable[[], Daemon],
        changed: Callable[[str], None],
        address: Callable[[], str],
    ) -> None:
        self._engine, self._runner, self._sessions = engine, runner, sessions
        self._viewing, self._events, self._status = viewing, events, status
        self._changed, self._address = changed, address

    def Status(
        self, request: operator_pb2.Empty, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """The daemon."""
        return _view(self._status())

    # -- sites --------------------------------------------------------------------------------------

    def Invite(
        self, request: operator_pb2.InviteRequest, context: grpc.ServicerContext
    ) -> operator_pb2.InviteReply:
        """A one-use join token; an unused one of the same site stops working."""
        if not SITE_NAME.match(request.site):
            raise InvalidInput(
                f'site name "{request.site}": lower-case letters, digits and hyphens, at most 63'
            )
        home = self._engine.home
        life = timedelta(seconds=request.valid_s or self._engine.config.sites.token_valid_s)
        token_id = secrets.token_hex(12)
        key = new_key()
        authority = home.authority()
        identity = Identity(home.federation, "bootstrap", token_id)
        certificate = issue(authority, key.public_key(), identity, life)
        expires = datetime.now(UTC) + life
        self._engine.ledger.invite(request.site, token_id, expires.timestamp())
        token = JoinToken(
            self._address(),
            certificate_pem(authority[1]),
            certificate_pem(certificate),
            key_pem(key),
        )
        self._engine.note("info", "", None, request.site, f"site {request.site} was invited")
        return operator_pb2.InviteReply(
            token=token.encode(), expires=expires.isoformat(timespec="seconds")
        )

    def Revoke(
        self, request: operator_pb2.SiteName, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Shut a site out, its open stream included."""
        self._engine.ledger.revoke(request.site)
        self._sessions.end(request.site)
        self._engine.note("warning", "", None, request.site, f"site {request.site} was revoked")
        return _view(self._viewing.site(request.site))

    def Sites(
        self, request: operator_pb2.Empty, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """All sites."""
        return _views(self._viewing.sites())

    # -- runs ---------------------------------------------------------------------------------------

    def Launch(
        self, request: operator_pb2.LaunchRequest, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Check a run and queue it."""
        row = launch(self._engine, request.config, request.start_from, request.start_file)
        self._changed(row.id)
        self._runner.wake()
        return _view(self._viewing.run(row.id))

    def Runs(self, request: operator_pb2.Empty, context: grpc.ServicerContext) -> operator_pb2.View:
        """All runs."""
        return _views(self._viewing.runs())

    def Run(
        self, request: operator_pb2.RunName, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """One run."""
        return _view(self._viewing.run(request.run))

    def Rounds(
        self, request: operator_pb2.RunName, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """A run's rounds."""
        return _views(self._viewing.rounds(request.run))

    def Watch(
        self, request: operator_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[operator_pb2.View]:
        """Events after a number, oldest first; then, while followed, as they come."""
        run = self._engine.ledger.run(request.run).id if request.run else None
        number = request.after
        while context.is_active():
            found = self._events.after(number, run)
            for event in found:
                number = event.number
                yield _view(event)
            if not found:
                if not request.follow:
                    return
                number = max(number, self._events.last_number()) if run is None else number
                self._events.wait(self._events.last_number(), STREAM_CHECK_S)

    def Stop(
        self, request: operator_pb2.StopRequest, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Stop a run after its round, or now."""
        row = self._engine.ledger.run(request.run)
        if row.state not in ("queued", "running", "paused"):
            raise Conflict(f"run {row.name}: it is {row.state} already")
        self._runner.stop(row.id, request.now)
        return _view(self._viewing.run(row.id))

    def Extend(
        self, request: operator_pb2.ExtendRequest, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """More rounds for a run that ended, or another try for one that is paused."""
        row = self._engine.ledger.run(request.run)
        if request.rounds > row.rounds:
            self._engine.ledger.extend_run(row.id, request.rounds)
        elif row.state != "paused":
            raise Conflict(
                f"run {row.name}: it has {row.rounds} rounds already; --rounds says how many in all"
            )
        if row.state not in ("queued", "running"):
            self._engine.ledger.set_run(row.id, state="queued", reason="")
        return self._queued(row.id)

    def Release(
        self, request: operator_pb2.RunName, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Commit the round that a run waits with; the run goes on."""
        return self._decided(request.run, holding.release)

    def Reject(
        self, request: operator_pb2.RunName, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Drop the round that a run waits with; the run goes on from the last good model."""
        return self._decided(request.run, holding.reject)

    def _decided(
        self, run: str, decide: Callable[[Ledger, RoundRow], RoundRow]
    ) -> operator_pb2.View:
        ledger = self._engine.ledger
        row = ledger.run(run)
        decide(ledger, holding.for_decision(ledger, row))
        ledger.set_run(row.id, state="queued", reason="")
        return self._queued(row.id)

    def Rollback(
        self, request: operator_pb2.RollbackRequest, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Go on from an earlier round."""
        row = roll_back(self._engine, request.run, request.round)
        self._viewing.forget(row.id)
        return self._queued(row.id)

    def _queued(self, run: str) -> operator_pb2.View:
        self._changed(run)
        self._runner.wake()
        return _view(self._viewing.run(run))

    def Verify(
        self, request: operator_pb2.RunName, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Check a run's ledger and what it names."""
        return _view(verify_run(self._engine, request.run))

    def Replay(
        self, request: operator_pb2.ReplayRequest, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Compute a committed round again."""
        return _view(replay(self._engine, request.run, request.round))

    def Export(
        self, request: operator_pb2.ExportRequest, context: grpc.ServicerContext
    ) -> Iterator[operator_pb2.FilePart]:
        """The files of an export, in parts; a file's parts follow one another."""
        asked = (request.run, request.round, request.of, request.stored, request.ledger)
        with exported(self._engine, *asked) as files:
            for path in files:
                yield operator_pb2.FilePart(name=path.name, data=b"")
                with path.open("rb") as file:
                    while data := file.read(PART_BYTES):
                        yield operator_pb2.FilePart(name=path.name, data=data)

    def Collect(
        self, request: operator_pb2.CollectRequest, context: grpc.ServicerContext
    ) -> operator_pb2.View:
        """Remove what retention does not keep."""
        return _view(retention.collect(self._engine, request.dry_run))


def _view(view: View) -> operator_pb2.View:
    return operator_pb2.View(json=view.model_dump_json())


def _views(views: Sequence[View]) -> operator_pb2.View:
    return operator_pb2.View(json=json.dumps([v.model_dump(mode="json") for v in views]))
