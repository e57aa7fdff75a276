"""The bulk service on the wire: chunks without the copies that protobuf's objects would make.

The bytes are those of `FetchReply` and `ContributeRequest` in ``protos/v1/site.proto``: both carry a
chunk in field 2. A chunk is framed by hand here (one copy) and read in place (none), which protobuf's
Python objects would copy three times each way. Whatever isn't framed as we do it goes to protobuf's
own parser, so any peer that follows the .proto file is understood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import grpc

from protos.digest import Bytes
from protos.v1 import common_pb2, site_pb2, site_pb2_grpc

SERVICE = "farflung.v1.Bulk"

READ_BUFFER = ("grpc.experimental.tcp_max_read_buffer_size", 256 << 10)
"""Bound of what a connection reads at a time. By itself gRPC has each keep a buffer as large as the most
that it ever read at once, idle or not: some 7 MB a site (docs/evidence.md). A gRPC that does not know
this bound ignores it."""

_CHUNK_TAG = 0x12  # field 2, length-delimited: `chunk` in both messages
_NUMBER_TAG = 0x08  # Chunk.number, varint
_DATA_TAG = 0x12  # Chunk.data, length-delimited


class Chunk(NamedTuple):
    """A chunk as it came.

    Attributes:
        number: Which one.
        data: Its bytes, in the message that was received.
    """

    number: int
    data: memoryview


def chunk_message(number: int, data: Bytes) -> bytes:
    """A `FetchReply` or `ContributeRequest` that carries one chunk."""
    about = bytearray()
    if number:
        about.append(_NUMBER_TAG)
        _put_varint(about, number)
    if len(data):
        about.append(_DATA_TAG)
        _put_varint(about, len(data))
    head = bytearray((_CHUNK_TAG,))
    _put_varint(head, len(about) + len(data))
    return b"".join((head, about, data))


def read_chunk(message: bytes) -> Chunk | None:
    """The chunk of a message that is framed as `chunk_message` does it; None for any other."""
    if not message or message[0] != _CHUNK_TAG:
        return None
    size, at = _varint(message, 1)
    if size < 0 or at + size != len(message):
        return None
    number = 0
    if at < len(message) and message[at] == _NUMBER_TAG:
        number, at = _varint(message, at + 1)
        if not 0 <= number < 1 << 32:
            return None
    if at == len(message):
        return Chunk(number, memoryview(b""))
    if message[at] != _DATA_TAG:
        return None
    size, at = _varint(message, at + 1)
    if size < 0 or at + size != len(message):
        return None
    return Chunk(number, memoryview(message)[at:])


def _put_varint(out: bytearray, value: int) -> None:
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A varint of at most five bytes and the place behind it; -1 where there is none."""
    value = 0
    for place, byte in enumerate(data[at : at + 5]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    return -1, at


Incoming = Chunk | site_pb2.FetchReply | site_pb2.ContributeRequest
"""A message of a bulk stream: a chunk, or the head in its protobuf message."""


def _serialize(message: Any) -> bytes:
    data: bytes = message if isinstance(message, bytes) else message.SerializeToString()
    return data


def deserializer(
    kind: type[site_pb2.FetchReply] | type[site_pb2.ContributeRequest],
) -> Callable[[bytes], Incoming]:
    """Reads the messages of a stream.

    Args:
        kind: The message of the .proto file.
    """

    def deserialize(data: bytes) -> Incoming:
        chunk = read_chunk(data)
        if chunk is not None:
            return chunk
        message = kind.FromString(data)
        if message.WhichOneof("kind") == "chunk":
            return Chunk(message.chunk.number, memoryview(message.chunk.data))
        return message

    return deserialize


class BulkStub:
    """The client's side: like the generated stub, but chunks are `Chunk` and bytes of `chunk_message`.

    Args:
        channel: An open connection.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self.FetchModel: Any = channel.unary_stream(
            f"/{SERVICE}/FetchModel",
            request_serializer=site_pb2.FetchRequest.SerializeToString,
            response_deserializer=deserializer(site_pb2.FetchReply),
        )
        self.Contribute: Any = channel.stream_unary(
            f"/{SERVICE}/Contribute",
            request_serializer=_serialize,
            response_deserializer=common_pb2.Answer.FromString,
        )
        self.ContributionStatus: Any = channel.unary_unary(
            f"/{SERVICE}/ContributionStatus",
            request_serializer=site_pb2.StatusRequest.SerializeToString,
            response_deserializer=site_pb2.StatusReply.FromString,
        )


def add_bulk(servicer: site_pb2_grpc.BulkServicer, server: grpc.Server) -> None:
    """The server's side: like the generated function, with the same exception as `BulkStub`."""
    handlers: dict[str, Any] = {
        "FetchModel": grpc.unary_stream_rpc_method_handler(
            servicer.FetchModel,
            request_deserializer=site_pb2.FetchRequest.FromString,
            response_serializer=_serialize,
        ),
        "Contribute": grpc.stream_unary_rpc_method_handler(
            servicer.Contribute,
            request_deserializer=deserializer(site_pb2.ContributeRequest),
            response_serializer=common_pb2.Answer.SerializeToString,
        ),
        "ContributionStatus": grpc.unary_unary_rpc_method_handler(
            servicer.ContributionStatus,
            request_deserializer=site_pb2.StatusRequest.FromString,
            response_serializer=site_pb2.StatusReply.SerializeToString,
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
