"""The daemon's side of a gateway's questions, on a Unix socket."""

from __future__ import annotations

from pathlib import Path

import grpc

from orchestrator.config import DaemonConfig
from orchestrator.intake import BlockCheck
from orchestrator.ledger import ContributionRow, Ledger
from orchestrator.recorder import Recorder
from orchestrator.site_server import ServerKeys
from protos.contribution import Header
from protos.errors import NotFound
from protos.v1 import gateway_pb2, gateway_pb2_grpc

ROW = tuple(field.name for field in gateway_pb2.AcceptRequest.DESCRIPTOR.fields)
"""The fields of a `ContributionRow` that travel: all but the verdict."""


class GatewayService(gateway_pb2_grpc.GatewayServicer):
    """Answers every gateway of this daemon.

    Args:
        config: The daemon's configuration.
        federation: Id of the federation.
        bind: host:port that the gateways share.
        keys: What they serve with.
        ledger: Knows the plans.
        recorder: Counts and refuses.
        check_blocks: Decodes an encoded contribution, in the compute process.
    """

    def __init__(
        self,
        config: DaemonConfig,
        federation: str,
        bind: str,
        keys: ServerKeys,
        ledger: Ledger,
        recorder: Recorder,
        check_blocks: BlockCheck,
    ) -> None:
        self._opened = gateway_pb2.OpenReply(
            config=config.model_dump_json(),
            federation=federation,
            bind=bind,
            key=keys.key,
            certificate=keys.certificate,
            authority=keys.authority,
        )
        self._ledger, self._recorder, self._check_blocks = ledger, recorder, check_blocks

    def Open(
        self, request: gateway_pb2.OpenRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.OpenReply:
        """What to serve with."""
        return self._opened

    def Accept(
        self, request: gateway_pb2.AcceptRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.AcceptReply:
        """Count a contribution."""
        values = {name: getattr(request, name) for name in ROW}
        if not request.HasField("norm"):
            values["norm"] = None
        acceptance = self._recorder.accept(ContributionRow(**values))
        return gateway_pb2.AcceptReply(
            verdict=acceptance.verdict,
            plan_id=acceptance.plan_id,
            reason=acceptance.reason,
            again=acceptance.again,
        )

    def Refuse(
        self, request: gateway_pb2.RefuseRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GatewayDone:
        """End a plan with a refusal."""
        self._recorder.refuse(request.plan_id, request.site, request.error, request.message)
        return gateway_pb2.GatewayDone()

    def Trouble(
        self, request: gateway_pb2.TroubleRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GatewayDone:
        """What a site sends can't be taken in just now."""
        self._recorder.troubled(request.site, request.message)
        return gateway_pb2.GatewayDone()

    def Check(
        self, request: gateway_pb2.CheckRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.CheckReply:
        """Decode the blocks of a wire codec."""
        row = self._ledger.plan(request.plan_id, request.site)
        if row is None:
            raise NotFound(f"site {request.site}: no plan {request.plan_id} was given to it")
        file = Path(request.header_file)
        header = Header.decode(file.read_bytes())
        norm, bad = self._check_blocks(row, header, file, Path(request.payload))
        return gateway_pb2.CheckReply(norm=norm, bad=bad)

    def Moved(
        self, request: gateway_pb2.MovedRequest, context: grpc.ServicerContext
    ) -> gateway_pb2.GatewayDone:
        """Payload bytes moved."""
        for row in request.sites:
            self._recorder.moved(row.site, received=row.received, sent=row.sent)
        return gateway_pb2.GatewayDone()
