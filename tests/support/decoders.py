"""Everything that decodes received bytes, each with what it must never do.

A decoder gives a value, or raises an error of the tree; nothing else, in bounded memory. What is
canonical has one form: what is accepted encodes to the same bytes again.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from protos.bulk import deserializer
from protos.contribution import Header, PayloadSpec
from protos.digest import digest
from protos.errors import FarflungError
from protos.identity import (
    TOKEN_PREFIX,
    Identity,
    JoinToken,
    certificate_pem,
    key_pem,
    new_authority,
)
from protos.identity import _checksum as checksum
from protos.manifest import CHUNK_BYTES, TILE_ELEMENTS, Index, Manifest, TensorSpec
from protos.plan import Plan, Schedule, StrategyChoice, TaskChoice, Work
from protos.v1 import site_pb2
from strategies.compression.bf16 import Bf16
from strategies.compression.codec import Codec
from strategies.compression.int4 import Int4
from strategies.compression.int8 import Int8
from strategies.compression.top_k import TopK

GROWTH_BYTES = 64 << 20
"""What the resident memory of a process may grow by for one input, which has a MiB at most."""

FIELD = Manifest((TensorSpec("w", (700,), "float32"),)).tiles[0]
WIDE = Manifest((TensorSpec("w", (TILE_ELEMENTS,), "float32"),)).tiles[0]
CODECS: tuple[Codec, ...] = (Bf16(), Int8(), Int4(), TopK(), TopK(fraction=0.2))


def _canonical(kind: type[Manifest | Index]) -> Callable[[bytes], object]:
    def decode(data: bytes) -> object:
        found = kind.decode(data)
        assert found.encoded == data, "accepted, and not canonical"
        return found

    return decode


def _document(kind: type[Header | Plan]) -> Callable[[bytes], object]:
    def decode(data: bytes) -> object:
        found = kind.decode(data)
        assert found.encode() == data, "accepted, and not canonical"
        return found.digest if isinstance(found, Header) else found.work_digest

    return decode


def _spans(data: bytes) -> object:
    """A header with the manifest that the orchestrator holds against it."""
    header = Header.decode(data)
    return header.expected_nbytes(MANIFEST), header.tail_spans(1 << 20)


def _block(data: bytes) -> object:
    """A codec's block of the right size, so that more than its length is looked at."""
    if not data:
        return None
    codec, tile = CODECS[data[0] % len(CODECS)], WIDE if data[0] > 250 else FIELD
    size = codec.nbytes(tile.elements)
    body = data[1:] or b"\0"
    decoded = codec.decode((body * (size // len(body) + 1))[:size], tile)
    assert decoded.shape == (tile.elements,)
    return decoded


def _token(data: bytes) -> object:
    """A join token whose checksum is right."""
    return JoinToken.decode(TOKEN_PREFIX + base64.urlsafe_b64encode(checksum(data) + data).decode())


def _protobuf(message: type[site_pb2.FromSite | site_pb2.ToSite]) -> Callable[[bytes], object]:
    from google.protobuf.message import DecodeError

    def decode(data: bytes) -> object:
        try:
            return message.FromString(data)
        except DecodeError:  # gRPC ends the stream of whoever sends it
            return None

    return decode


def _bulk(
    kind: type[site_pb2.FetchReply | site_pb2.ContributeRequest],
) -> Callable[[bytes], object]:
    from google.protobuf.message import DecodeError

    read = deserializer(kind)

    def decode(data: bytes) -> object:
        try:
            return read(data)
        except DecodeError:
            return None

    return decode


DECODERS: Mapping[str, Callable[[bytes], object]] = {
    "manifest": _canonical(Manifest),
    "index": _canonical(Index),
    "header": _document(Header),
    "header and manifest": _spans,
    "plan": _document(Plan),
    "fetch reply": _bulk(site_pb2.FetchReply),
    "contribute request": _bulk(site_pb2.ContributeRequest),
    "from site": _protobuf(site_pb2.FromSite),
    "to site": _protobuf(site_pb2.ToSite),
    "identity": lambda data: Identity.parse(data.decode("latin-1")),
    "join token": lambda data: JoinToken.decode(data.decode("latin-1")),
    "join token inside": _token,
    "block": _block,
}

MANIFEST = Manifest(
    (
        TensorSpec("a.weight", (3, 700), "float32"),
        TensorSpec("a.bias", (0,), "bfloat16", group="head"),
        TensorSpec("n.count", (), "int64", kind="counter", ties=("m.count",)),
    )
)


def _index() -> Index:
    size = 2 * CHUNK_BYTES + 5
    return Index(MANIFEST.digest, size, tuple(digest(bytes([i])) for i in range(3)))


def _header() -> Header:
    return Header(
        plan_id="r-1/3/1/train",
        work_digest="0" * 64,
        site="north",
        kind="train",
        base="1" * 64,
        manifest=MANIFEST.digest,
        index=_index().digest,
        payloads=(PayloadSpec(name="s/bins", shape=(2, 3), dtype="int32", merge="sum"),),
        examples=12,
        metrics={"train_loss": 0.25},
    )


def _plan() -> Plan:
    return Plan(
        run="r-1",
        round=3,
        attempt=1,
        kind="train",
        site="north",
        base="1" * 64,
        manifest=MANIFEST.digest,
        accepts=("1" * 64,),
        task=TaskChoice(name="t", params={"width": 3}),
        stack=(StrategyChoice(name="fedprox", params={"mu": 0.1}),),
        work=Work(epochs=2),
        schedule=Schedule(shape="constant", lr=0.1),
        batch_size=8,
    )


def _a_token() -> JoinToken:
    key, certificate = new_authority("f")
    pem = certificate_pem(certificate)
    return JoinToken("127.0.0.1:8470", pem, pem, key_pem(key))


def _packed(codec: Codec, values: torch.Tensor) -> bytes:
    block = torch.empty(codec.nbytes(len(values)), dtype=torch.uint8)
    codec.pack(values.clone(), torch.empty(2, len(values)), block)
    return block.numpy().tobytes()


def seeds() -> list[tuple[str, bytes]]:
    """Inputs that are right, by decoder."""
    index, header, plan = _index(), _header(), _plan()
    head = site_pb2.ArtefactHead(index=index.encoded, manifest=MANIFEST.encoded)
    contribution = site_pb2.ContributionHead(
        header=header.encode(), signature=b"s" * 70, index=index.encoded
    )
    offer = site_pb2.PlanOffer(plan=plan.encode())
    values = torch.linspace(-1, 2, FIELD.elements)
    return [
        ("manifest", MANIFEST.encoded),
        ("index", index.encoded),
        ("header", header.encode()),
        ("header and manifest", header.encode()),
        ("plan", plan.encode()),
        ("fetch reply", site_pb2.FetchReply(head=head).SerializeToString()),
        ("contribute request", site_pb2.ContributeRequest(head=contribution).SerializeToString()),
        ("to site", site_pb2.ToSite(plan=offer).SerializeToString()),
        ("identity", Identity("f-0123", "site", "north").uri.encode()),
        ("join token", _a_token().encode().encode()),
        ("join token inside", json.dumps(["127.0.0.1:1", "a", "b", "c"]).encode()),
        *(("block", bytes([i]) + _packed(codec, values)) for i, codec in enumerate(CODECS)),
    ]


def resident() -> int:
    """Resident memory of this process, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def examine(decode: Callable[[bytes], object], data: bytes) -> str:
    """What a decoder does wrong with an input; empty if nothing."""
    before = resident()
    try:
        decode(data)
    except FarflungError as error:
        if not error.message:
            return "an error without a message"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    grown = resident() - before
    return f"{grown} bytes more in memory" if grown > GROWTH_BYTES else ""
