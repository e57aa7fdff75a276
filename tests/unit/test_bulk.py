"""The bulk service's framing: the bytes are those of the .proto file, whoever reads or writes them."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from protos.bulk import Chunk, chunk_message, deserializer, read_chunk
from protos.v1 import common_pb2, site_pb2

NUMBERS = st.integers(0, 2**32 - 1)
DATA = st.one_of(st.binary(max_size=300), st.sampled_from([127, 128, 16383, 16384]).map(bytes))
KINDS = st.sampled_from([site_pb2.FetchReply, site_pb2.ContributeRequest])


@given(NUMBERS, DATA, KINDS)
def test_any_reader_of_the_proto_file_understands_it(number: int, data: bytes, kind: type) -> None:
    message = kind.FromString(chunk_message(number, memoryview(data)))
    assert message.WhichOneof("kind") == "chunk"
    assert (message.chunk.number, message.chunk.data) == (number, data)


@given(NUMBERS, DATA, KINDS)
def test_what_any_writer_of_the_proto_file_sends_is_understood(
    number: int, data: bytes, kind: type
) -> None:
    sent = kind(chunk=common_pb2.Chunk(number=number, data=data)).SerializeToString()
    assert deserializer(kind)(sent) == Chunk(number, memoryview(data))


def test_fields_in_another_order_are_understood() -> None:
    chunk = b"\x12\x03abc\x08\x05"  # data before number, which is as legal
    message = b"\x12" + bytes([len(chunk)]) + chunk
    assert read_chunk(message) is None
    assert deserializer(site_pb2.FetchReply)(message) == Chunk(5, memoryview(b"abc"))


def test_a_head_stays_a_message() -> None:
    head = site_pb2.FetchReply(head=site_pb2.ArtefactHead(index=b"i", manifest=b"m"))
    assert deserializer(site_pb2.FetchReply)(head.SerializeToString()) == head


@given(st.binary(max_size=40), KINDS)
def test_junk_is_read_as_protobuf_reads_it(junk: bytes, kind: type) -> None:
    try:
        expected = kind.FromString(junk)
    except DecodeError:
        with pytest.raises(DecodeError):
            deserializer(kind)(junk)
        return
    found = deserializer(kind)(junk)
    if expected.WhichOneof("kind") == "chunk":
        assert found == Chunk(expected.chunk.number, memoryview(expected.chunk.data))
    else:
        assert found == expected


def test_nothing_is_copied_on_arrival() -> None:
    message = chunk_message(7, bytes(1 << 20))
    chunk = read_chunk(message)
    assert chunk is not None
    assert chunk.data.obj is message
