"""A site as the orchestrator's doors see it: its key, its certificate, and what it sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
from torch import Tensor

from orchestrator.doorkeeper import Caller
from protos.bulk import Incoming, deserializer
from protos.contribution import Header, Merge, PayloadSpec
from protos.digest import digest
from protos.identity import Key, certificate_pem, sign_header
from protos.manifest import CHUNK_BYTES, Index, Manifest
from protos.plan import Plan
from protos.tensors import DTYPES, dtype_name, view_bytes
from protos.v1 import common_pb2, site_pb2
from tests.support.authority import Authority


class Call(grpc.ServicerContext):  # type: ignore[misc]  # grpc has no types
    """The context of a call by the holder of a certificate."""

    def __init__(self, certificate: bytes | None) -> None:
        self.certificate = certificate
        self.ended: list[Callable[[], None]] = []

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        return {} if self.certificate is None else {"x509_pem_cert": [self.certificate]}

    def add_callback(self, callback: Callable[[], None]) -> bool:
        self.ended.append(callback)
        return True

    def _never(self, *args: Any, **more: Any) -> Any:
        raise NotImplementedError

    invocation_metadata = peer = peer_identities = peer_identity_key = _never
    set_compression = send_initial_metadata = set_trailing_metadata = abort = _never
    abort_with_status = set_code = set_details = is_active = time_remaining = cancel = _never


class Contributor:
    """A site.

    Args:
        authority: Who signed its certificate.
        name: Its name.
    """

    def __init__(self, authority: Authority, name: str) -> None:
        self.name = name
        self.key: Key
        self.caller: Caller
        self.key, self.caller = authority.caller(name)

    @property
    def call(self) -> Call:
        """The context of a call by this site."""
        return Call(certificate_pem(self.caller.certificate))

    def payload(
        self, manifest: Manifest, updates: Mapping[str, Tensor], sides: Sequence[Tensor] = ()
    ) -> bytes:
        """Raw tiles in order, then side payloads."""
        parts = []
        for tile in manifest.tiles:
            flat = updates[tile.spec.name].flatten()[tile.start : tile.stop]
            parts.append(bytes(view_bytes(flat.to(DTYPES[tile.spec.wire_dtype]))))
        return b"".join([*parts, *(bytes(view_bytes(t)) for t in sides)])

    def head(
        self,
        plan: Plan,
        data: bytes,
        manifest: str,
        sides: Mapping[str, tuple[Tensor, Merge]] | None = None,
        /,
        *,
        signer: Key | None = None,
        signed_plan: str = "",
        other_index: Index | None = None,
        **changes: Any,
    ) -> site_pb2.ContributionHead:
        """A signed head for some bytes.

        Args:
            plan: What is answered.
            data: The payload.
            manifest: Digest of the manifest of the covered tensors.
            sides: Side payloads, in the order of their bytes.
            signer: Another key to sign with.
            signed_plan: Another plan to sign for.
            other_index: Another index to send.
            changes: Fields of the header that are something else.
        """
        pieces = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
        index = other_index or Index(manifest, len(data), tuple(digest(p) for p in pieces))
        specs = [
            PayloadSpec(name=n, shape=tuple(t.shape), dtype=dtype_name(t), merge=merge)
            for n, (t, merge) in (sides or {}).items()
        ]
        fields: dict[str, Any] = {
            "plan_id": plan.id,
            "work_digest": plan.work_digest,
            "site": self.name,
            "kind": plan.kind,
            "base": plan.base,
            "manifest": manifest,
            "index": index.digest,
            "payloads": tuple(specs),
            "examples": 10,
        }
        header = Header(**{**fields, **changes})
        encoded = header.encode()
        signature = sign_header(
            signer or self.key, encoded, signed_plan or header.plan_id, header.site
        )
        return site_pb2.ContributionHead(header=encoded, signature=signature, index=index.encoded)


def chunks(data: bytes, numbers: Sequence[int] | None = None) -> Iterator[common_pb2.Chunk]:
    """The chunks of a payload, all or some of them."""
    for number in range(-(-len(data) // CHUNK_BYTES)) if numbers is None else numbers:
        piece = data[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]
        yield common_pb2.Chunk(number=number, data=piece)


def messages(
    head: site_pb2.ContributionHead, parts: Iterator[common_pb2.Chunk]
) -> Iterator[site_pb2.ContributeRequest]:
    """A head and chunks as a call sends them."""
    yield site_pb2.ContributeRequest(head=head)
    for chunk in parts:
        yield site_pb2.ContributeRequest(chunk=chunk)


def arrived(
    head: site_pb2.ContributionHead, parts: Iterator[common_pb2.Chunk]
) -> Iterator[Incoming]:
    """The same as the service gets them."""
    read = deserializer(site_pb2.ContributeRequest)
    return (read(message.SerializeToString()) for message in messages(head, parts))
