"""Joining a federation with a token, and renewing the certificate that came of it."""

from __future__ import annotations

from pathlib import Path

import grpc

from protos.chunks import write_durably
from protos.digest import digest
from protos.errors import DataCorrupt, FarflungError, Unavailable
from protos.faults import reach
from protos.hang_up import hang_up
from protos.identity import (
    JoinToken,
    Key,
    key_pem,
    load_certificate,
    load_key,
    new_key,
    signing_request,
)
from protos.rpc import from_rpc_error
from protos.v1 import site_pb2, site_pb2_grpc
from site_agent.link.keys import Keys, store
from site_agent.link.wire import Wire, dial

TIMEOUT_S = 30.0


def join(token: JoinToken, folder: Path, address: str = "", server_name: str = "") -> Keys:
    """Make a key here, have it certified, and keep both.

    The key is kept from the first attempt on, so that a reply which got lost can be asked for
    again with the same token.

    Args:
        token: From ``farflung invite``.
        folder: Where keys go.
        address: host:port to dial; empty for the token's.
        server_name: Name to expect in the orchestrator's certificate.

    Raises:
        TokenUsed: It was used before, revoked, or has expired.
        Unavailable: The orchestrator can't be reached.
    """
    pending = folder.with_name(f".{folder.name}.{digest(token.certificate)[:16]}.pem")
    reach("join.begun")
    key = _pending_key(pending)
    reach("join.key.kept")
    channel = dial(
        address or token.address, token.key, token.certificate, token.authority, server_name
    )
    try:
        reply = _enrol(channel, key)
    except Unavailable as error:
        raise Unavailable(
            f"orchestrator {address or token.address}: {error.message}; the token is still good, "
            "try again when it can be reached"
        ) from None
    finally:
        hang_up(channel)
    keys = Keys(folder, key, reply.certificate, reply.authority, token.address)
    _check(keys)
    store(keys)
    reach("join.stored")
    pending.unlink(missing_ok=True)
    reach("join.done")
    return keys


def renew(keys: Keys, wire: Wire) -> Keys:
    """A new certificate for the same key.

    Raises:
        FarflungError: The orchestrator can't be reached or refuses.
    """
    channel = wire.open()
    try:
        reply = _enrol(channel, keys.key)
    finally:
        hang_up(channel)
    _check(Keys(keys.folder, keys.key, reply.certificate, reply.authority, keys.address))
    return keys.renewed(reply.certificate, reply.authority)


def _pending_key(path: Path) -> Key:
    try:
        return load_key(path.read_bytes())
    except (FarflungError, OSError):
        key = new_key()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, key_pem(key), 0o600)
    return key


def _enrol(channel: grpc.Channel, key: Key) -> site_pb2.EnrollReply:
    stub = site_pb2_grpc.ControlStub(channel)
    request = site_pb2.EnrollRequest(signing_request=signing_request(key))
    try:
        return stub.Enroll(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        raise from_rpc_error(error) from None


def _check(keys: Keys) -> None:
    certified = load_certificate(keys.certificate).public_key()
    if certified != keys.key.public_key():
        raise DataCorrupt("the orchestrator certified another key than this site's")
    load_certificate(keys.authority)
