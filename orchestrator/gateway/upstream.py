"""The daemon as a gateway sees it."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from orchestrator.gateway.gateway_service import ROW
from orchestrator.ledger import Acceptance, ContributionRow, PlanRow
from orchestrator.operator_socket import GATEWAY, OperatorSocket
from protos.contribution import Header
from protos.errors import FarflungError
from protos.hang_up import MOST_S, hang_up
from protos.rpc import from_rpc_error
from protos.v1 import gateway_pb2, gateway_pb2_grpc

log = logging.getLogger(__name__)

TELL_S = 0.25
"""Bytes that moved are told this often, and before a contribution is counted."""


class Upstream:
    """A connection to the daemon of a home: a `Recorder`, and the check of encoded blocks.

    Nothing here waits for a daemon that is gone: every call raises `Unavailable` then.

    Args:
        home: The home folder.
    """

    def __init__(self, home: Path) -> None:
        self._socket = OperatorSocket(home, GATEWAY)
        self._channel = grpc.insecure_channel(
            self._socket.target,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
            ],
        )
        self._stub = gateway_pb2_grpc.GatewayStub(self._channel)
        self._lock = threading.Lock()
        self._bytes: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        self._end = threading.Event()
        self._teller = threading.Thread(target=self._tell_on, name="teller", daemon=True)
        self._teller.start()

    def close(self) -> None:
        """Tell what is left, and end the connection."""
        self._end.set()
        self._teller.join()
        hang_up(self._channel, MOST_S)
        self._socket.close()

    def open(self) -> gateway_pb2.OpenReply:
        """What to serve with."""
        reply: gateway_pb2.OpenReply = _asked(self._stub.Open, gateway_pb2.OpenRequest())
        return reply

    def accept(self, row: ContributionRow) -> Acceptance:
        """See `Recorder.accept`."""
        self._tell()  # or the round may be over before its last bytes are known
        values = {name: getattr(row, name) for name in ROW}
        reply = _asked(self._stub.Accept, gateway_pb2.AcceptRequest(**values))
        facts = {"site": row.site, "run": row.run, "round": row.round}
        log.info("contribution %s: %s", row.digest[:12], reply.verdict, extra=facts)
        return Acceptance(reply.verdict, reply.plan_id, reply.reason, reply.again)

    def refuse(self, plan_id: str, site: str, error: str, message: str) -> None:
        """See `Recorder.refuse`."""
        request = gateway_pb2.RefuseRequest(
            plan_id=plan_id, site=site, error=error, message=message
        )
        _asked(self._stub.Refuse, request)

    def troubled(self, site: str, text: str) -> None:
        """See `Recorder.troubled`."""
        try:
            _asked(self._stub.Trouble, gateway_pb2.TroubleRequest(site=site, message=text))
        except FarflungError as error:
            log.warning("site %s: %s, and the daemon can't be told: %s", site, text, error.message)

    def check_blocks(
        self, row: PlanRow, header: Header, header_file: Path, payload: Path
    ) -> tuple[float | None, str]:
        """See `Blocks`; the daemon's compute process does it."""
        request = gateway_pb2.CheckRequest(
            plan_id=row.id, site=row.site, header_file=str(header_file), payload=str(payload)
        )
        reply = _asked(self._stub.Check, request)
        return reply.norm if reply.HasField("norm") else None, reply.bad

    def moved(self, site: str, received: int = 0, sent: int = 0) -> None:
        """See `Recorder.moved`."""
        with self._lock:
            total = self._bytes[site]
            total[0] += received
            total[1] += sent

    def _tell_on(self) -> None:
        while not self._end.wait(TELL_S):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        with self._lock:
            rows = [
                gateway_pb2.MovedBytes(site=site, received=received, sent=sent)
                for site, (received, sent) in self._bytes.items()
            ]
            self._bytes.clear()
        if rows:
            try:
                _asked(self._stub.Moved, gateway_pb2.MovedRequest(sites=rows))
            except FarflungError:
                pass  # a figure on a page; a daemon that is gone ends this process too


def _asked(call: Callable[[Any], Any], request: Any) -> Any:
    try:
        return call(request)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None
