"""What every request passes and every answer carries: Host check, content-security policy.

The page listens on loopback without credentials, so another page in the same browser is the
attacker to think of. It can't read our answers (no CORS header), can't frame or embed them
(the headers below), and can't make its own name point to 127.0.0.1 and thereby become us (DNS
rebinding): a request must name loopback in its Host header.
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # No string ever becomes markup or script, neither in our modules nor in the vendored one.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def host_name(value: str) -> str:
    """The name in a Host header, without port and brackets: ``[::1]:80`` is ``::1``."""
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].lower()


def is_loopback(name: str) -> bool:
    """Whether a name is this machine and nothing else: a loopback address, or ``localhost``."""
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guard:
    """Middleware: refuses foreign Host headers and adds ``HEADERS`` to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with 421."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # An HTTP request has one Host header; two are an attempt to be read in two ways.
        hosts = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        if len(hosts) != 1 or not is_loopback(host_name(hosts[0])):
            refusal = JSONResponse(
                {
                    "error": "Refused",
                    "message": "The dashboard answers to localhost, 127.0.0.1 and [::1] only. "
                    "From another machine, open a tunnel: ssh -L 8080:127.0.0.1:PORT HOST",
                    "facts": {"host": ", ".join(hosts)},
                },
                status_code=421,
            )
            await refusal(scope, receive, guarded)
            return
        await self.app(scope, receive, guarded)
