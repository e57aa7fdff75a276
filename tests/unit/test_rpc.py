"""Errors over a real gRPC server: what a handler raises is what the caller catches."""

import logging
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from protos.errors import (
    ERRORS,
    Conflict,
    ContributionRefused,
    FarflungError,
    NotFound,
    TokenUsed,
    Unavailable,
    row,
)
from protos.rpc import MAX_MESSAGE_BYTES, ErrorInterceptor, from_rpc_error, to_status

KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


def raiser(error: BaseException, streams: bool) -> Any:
    def single(request: Any, context: grpc.ServicerContext) -> bytes:
        if not isinstance(request, bytes):
            list(request)
        raise error

    def stream(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"first"
        raise error

    return stream if streams else single


@contextmanager
def server(handlers: dict[str, Any], interceptor: ErrorInterceptor) -> Iterator[grpc.Channel]:
    running = grpc.server(
        futures.ThreadPoolExecutor(2),
        interceptors=[interceptor],
        options=[("grpc.so_reuseport", 0)],
    )
    running.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.T", handlers),))
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        running.stop(None).wait()


def call(channel: grpc.Channel, kind: str) -> None:
    method = getattr(channel, kind)("/t.T/Go")
    request: Any = iter([b"a", b"b"]) if kind.startswith("stream") else b"a"
    answer = method(request, timeout=10)
    if kind.endswith("_stream"):
        list(answer)


def caught(error: BaseException, kind: str, interceptor: ErrorInterceptor) -> FarflungError:
    make = getattr(grpc, f"{kind}_rpc_method_handler")
    handlers = {"Go": make(raiser(error, kind.endswith("_stream")))}
    with server(handlers, interceptor) as channel:
        with pytest.raises(grpc.RpcError) as info:
            call(channel, kind)
        return from_rpc_error(info.value)


@pytest.mark.parametrize("kind", KINDS)
def test_class_message_and_facts_survive_every_kind_of_call(kind: str) -> None:
    sent = ContributionRefused("north: tensor fc.weight is not finite", site="north", count=3)
    got = caught(sent, kind, ErrorInterceptor())
    assert type(got) is ContributionRefused
    assert got.message == sent.message
    assert got.facts == {"site": "north", "count": 3}


@pytest.mark.parametrize("cls", list(ERRORS))
def test_every_class_of_the_table_has_a_real_status(cls: type[FarflungError]) -> None:
    status = to_status(cls("what happened"))
    assert status.code.name == row(cls("")).status
    assert status.details == "what happened"


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream"])
def test_a_stranger_gets_a_reference_and_the_log_the_cause(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        got = caught(KeyError("secret"), kind, ErrorInterceptor())
    assert type(got) is FarflungError
    assert "secret" not in got.message
    reference = str(got.facts["reference"])
    assert reference in got.message
    assert reference in caplog.text
    assert "secret" in caplog.text


def test_who_is_not_trusted_reads_the_public_sentence_only() -> None:
    got = caught(
        TokenUsed("token 42 of site north", site="north"),
        "unary_unary",
        ErrorInterceptor(public=lambda context: True),
    )
    assert type(got) is TokenUsed
    assert got.message == ERRORS[TokenUsed].public
    assert got.facts == {}


def test_a_long_message_is_cut_within_what_metadata_may_hold() -> None:
    got = caught(NotFound("η" * 100_000, name="x" * 100_000), "unary_unary", ErrorInterceptor())
    assert type(got) is NotFound
    assert got.message.endswith("…")
    assert len(got.message.encode()) < MAX_MESSAGE_BYTES + 10
    assert got.facts == {}


def test_no_server_is_unavailable() -> None:
    with (
        grpc.insecure_channel("unix:/nowhere/at/all") as channel,
        pytest.raises(grpc.RpcError) as info,
    ):
        channel.unary_unary("/t.T/Go")(b"", timeout=10)
    assert type(from_rpc_error(info.value)) is Unavailable


def test_an_unknown_call_is_a_conflict_of_versions() -> None:
    with server({}, ErrorInterceptor()) as channel, pytest.raises(grpc.RpcError) as info:
        call(channel, "unary_unary")
    assert type(from_rpc_error(info.value)) is Conflict


def test_a_line_that_garbles_bytes_is_one_that_broke() -> None:
    """What gRPC says then, as seen from a proxy that flipped a bit."""

    class Broken(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.UNKNOWN

        def details(self) -> str:
            return "Stream removed (Unwrap failed (TSI_DATA_CORRUPTED))"

        def trailing_metadata(self) -> None:
            return None

    got = from_rpc_error(Broken())
    assert type(got) is Unavailable
    assert "TSI_DATA_CORRUPTED" in got.message


def test_a_handler_that_aborts_by_itself_is_left_alone() -> None:
    def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    handlers = {"Go": grpc.unary_unary_rpc_method_handler(handle)}
    with server(handlers, ErrorInterceptor()) as channel, pytest.raises(grpc.RpcError) as info:
        call(channel, "unary_unary")
    got = from_rpc_error(info.value)
    assert (type(got), got.message) == (NotFound, "gone")


def test_control_characters_of_the_other_end_do_not_reach_a_terminal() -> None:
    got = caught(NotFound("a\x1b[31mb\r\n"), "unary_unary", ErrorInterceptor())
    assert "\x1b" not in got.message
    assert "\n" not in got.message
