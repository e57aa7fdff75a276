"""Errors on the wire: a `FarflungError` as a gRPC status, and back.

The status carries the message, trailing metadata the class name and the facts, so that the error
which a handler raises is the error which the caller catches. Whatever is not in the tree of
`protos/errors.py` becomes INTERNAL with a reference id; its cause stays in the server's log.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn, cast

import grpc

from protos.errors import (
    ERRORS,
    Conflict,
    FarflungError,
    Unavailable,
    by_name,
    reference_id,
    row,
)

ERROR_KEY = "farflung-error"
FACTS_KEY = "farflung-facts-bin"
MAX_MESSAGE_BYTES = 1500
"""gRPC escapes each byte beyond ASCII as three, and all metadata together must stay under 8 KiB."""
MAX_FACTS_BYTES = 2000

log = logging.getLogger(__name__)


class Status(NamedTuple):
    """What goes on the wire for an error."""

    code: grpc.StatusCode
    details: str
    trailing: tuple[tuple[str, str | bytes], ...]


def to_status(error: FarflungError, public: bool = False) -> Status:
    """The status of an error.

    Args:
        error: What happened.
        public: For a caller who is not trusted: the table's sentence instead of message and facts.
    """
    entry = row(error)
    details = entry.public if public else _shortened(error.message)
    trailing: list[tuple[str, str | bytes]] = [(ERROR_KEY, _listed(error).__name__)]
    facts = b"" if public else json.dumps(error.facts).encode()
    if error.facts and facts and len(facts) <= MAX_FACTS_BYTES:
        trailing.append((FACTS_KEY, facts))
    return Status(grpc.StatusCode[entry.status], details, tuple(trailing))


def _listed(error: FarflungError) -> type[FarflungError]:
    """Its class, or the nearest base that the other end has in its table too."""
    return next(cls for cls in type(error).__mro__ if cls in ERRORS)


def from_rpc_error(error: grpc.RpcError) -> FarflungError:
    """The error that the other end raised, or what gRPC itself found wrong.

    Everything in it was written by the other end: the message is cut and freed of control
    characters, unknown class names become the base class.
    """
    call = cast(grpc.Call, error)
    if not callable(getattr(error, "code", None)):
        return Unavailable(f"the connection broke ({type(error).__name__})")
    code = call.code()
    message = _printable(call.details() or "")
    trailing = {str(key): value for key, value in call.trailing_metadata() or ()}
    if ERROR_KEY in trailing:
        name = trailing[ERROR_KEY]
        cls = by_name(name.decode(errors="replace") if isinstance(name, bytes) else name)
        return cls(message or ERRORS[cls].public, **_facts(trailing.get(FACTS_KEY)))
    return _of_grpc(code, message)


def _of_grpc(code: grpc.StatusCode, message: str) -> FarflungError:
    if code in (
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,  # "Stream removed": TLS found the bytes damaged; ours have a name
    ):
        return Unavailable(f"the other end can't be reached: {message or code.name}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Conflict(f"the other end does not know this call; do the versions fit? {message}")
    for cls, entry in ERRORS.items():
        if entry.status == code.name:
            return cls(message or entry.public)
    return FarflungError(f"{code.name}: {message}")


def _facts(value: str | bytes | None) -> dict[str, Any]:
    try:
        facts = json.loads(value or b"{}")
    except ValueError:
        return {}
    if not isinstance(facts, dict):
        return {}
    return {
        str(key): value
        for key, value in facts.items()
        if key != "message" and isinstance(value, str | int | float | bool)
    }


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[: 4 * MAX_MESSAGE_BYTES])


def _shortened(text: str) -> str:
    data = text.encode()
    if len(data) <= MAX_MESSAGE_BYTES:
        return text
    return data[:MAX_MESSAGE_BYTES].decode(errors="ignore") + " …"


Handle = Callable[[Any, grpc.ServicerContext], Any]


class ErrorInterceptor(grpc.ServerInterceptor):
    """Turns what handlers raise into statuses; for all four kinds of calls.

    Args:
        public: Whether a caller may read only the table's public sentence. Default: nobody is so
            treated.
    """

    def __init__(self, public: Callable[[grpc.ServicerContext], bool] | None = None) -> None:
        self._public = public

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """The handler of a call, with its errors translated."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.response_streaming:
            kind = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            handle = self._streaming(inner, method)
        else:
            kind = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            handle = self._single(inner, method)
        return kind(handle, handler.request_deserializer, handler.response_serializer)

    def _single(self, inner: Handle, method: str) -> Handle:
        def handle(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                return inner(request, context)
            except Exception as error:  # noqa: BLE001  # the boundary: nothing may pass untranslated
                self._abort(error, context, method)

        return handle

    def _streaming(self, inner: Handle, method: str) -> Handle:
        def handle(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                yield from inner(request, context)
            except Exception as error:  # noqa: BLE001  # the boundary: nothing may pass untranslated
                self._abort(error, context, method)

        return handle

    def _abort(self, error: Exception, context: Any, method: str) -> NoReturn:
        if context.code() is not None or not context.is_active():
            # The handler called `abort` itself, or the caller is gone and its requests ended.
            raise error
        if not isinstance(error, FarflungError):
            reference = reference_id()
            log.error("%s failed, reference %s", method, reference, exc_info=error)
            error = FarflungError(
                f"an internal error; the log has its cause under {reference}", reference=reference
            )
        public = self._public is not None and self._public(context)
        status = to_status(error, public)
        context.set_trailing_metadata(status.trailing)
        context.abort(status.code, status.details)
        raise AssertionError("abort raises")
