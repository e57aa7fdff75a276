"""The dashboard's routes, and the server that the daemon runs them in.

    /                           the page
    /static/…                   its modules, styles and the vendored chart library
    /api/status                 views.Daemon
    /api/sites                  [views.Site]
    /api/runs                   [views.Run]
    /api/runs/RUN               views.Run
    /api/runs/RUN/rounds        [views.Round]
    /api/runs/RUN/rounds/N/kept/STRATEGY/NAME   a JSON file that a strategy keeps beside the model
    /api/events?run=RUN         views.Event, as server-sent events; resumes after Last-Event-ID

The JSON is that of ``--json``. Whatever a viewer chose is in the page's address, so nothing is
kept here for anyone, and a page that is opened twice costs nothing twice.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import uvicorn
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from orchestrator.dashboard.assets import Assets
from orchestrator.dashboard.guard import Guard, is_loopback
from orchestrator.dashboard.stream import Events, EventStream, TooManyViewers
from orchestrator.views import Daemon, Round, Run, Site
from protos.errors import ERRORS, ConfigInvalid, FarflungError, NotFound

START_S = 10.0

_HTTP = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 403,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "FAILED_PRECONDITION": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 507,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class Operator(Protocol):
    """What the page reads: the ``Operator`` service as blocking calls, without its verbs."""

    def status(self) -> Daemon:
        """The daemon itself."""
        ...

    def sites(self) -> Sequence[Site]:
        """Every site of the federation."""
        ...

    def runs(self) -> Sequence[Run]:
        """Every run, oldest first."""
        ...

    def run(self, name: str) -> Run:
        """One run, by name or id."""
        ...

    def rounds(self, name: str) -> Sequence[Round]:
        """Its rounds, oldest first."""
        ...

    def kept(self, run: str, round: int, strategy: str) -> Mapping[str, bytes]:
        """What a strategy keeps beside the model of a round: name to bytes."""
        ...

    def watch(self, run: str, after: int, follow: bool) -> Events:
        """Events with a number greater than ``after``; then, if followed, as they happen."""
        ...


def _json(view: type | Any, read: Callable[[Request], Any]) -> Callable[[Request], Awaitable[Any]]:
    adapter: TypeAdapter[Any] = TypeAdapter(view)

    async def answer(request: Request) -> Response:
        # Reading blocks on the daemon, and 500 rounds of 64 sites take a while to write out.
        body = await run_in_threadpool(lambda: adapter.dump_json(read(request)))
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    return answer


async def _failed(_: Request, error: Exception) -> Response:
    if not isinstance(error, FarflungError):
        raise error
    row = next(ERRORS[cls] for cls in type(error).__mro__ if cls in ERRORS)
    body = {"error": type(error).__name__, "message": error.message, "facts": error.facts}
    return JSONResponse(body, status_code=_HTTP.get(row.status, 500))


async def _unrouted(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    body = {"error": "NotFound", "message": f"Nothing is here: {error.detail}.", "facts": {}}
    return JSONResponse(body, status_code=error.status_code)


def create_app(operator: Operator) -> Starlette:
    """The dashboard of one operator.

    Args:
        operator: Where everything is read from; its methods may block.
    """
    stream = EventStream(operator)

    assets = Assets()

    async def page(request: Request) -> Response:
        return assets.answer(request, "index.html")

    async def static(request: Request) -> Response:
        return assets.answer(request, request.path_params["path"])

    def drawing(request: Request) -> bytes:
        run, round, strategy, name = (
            request.path_params[key] for key in ("run", "round", "strategy", "name")
        )
        if not name.endswith(".json"):
            raise NotFound("the page is given JSON only; `farflung export --of` gives the rest")
        files = operator.kept(run, round, strategy)
        if name not in files:
            raise NotFound(f"round {round}: strategy {strategy} keeps no file {name}")
        return files[name]

    async def kept(request: Request) -> Response:
        body = await run_in_threadpool(drawing, request)
        return Response(body, media_type="application/json", headers={"cache-control": "no-store"})

    async def events(request: Request) -> Response:
        name = request.query_params.get("run", "")
        runs = None
        if name:
            run = await run_in_threadpool(operator.run, name)
            runs = frozenset((run.id, run.name))
        seen = request.headers.get("last-event-id", request.query_params.get("after", ""))
        after = int(seen) if seen.isascii() and seen.isdigit() else None
        try:
            text = await stream.events(runs, after)
        except TooManyViewers:
            message = "Too many pages are open on this dashboard: close one, then reload."
            body = {"error": "Unavailable", "message": message, "facts": {}}
            return JSONResponse(body, status_code=503)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        return StreamingResponse(text, media_type="text/event-stream", headers=headers)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        stream.start()
        yield
        stream.end()

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/static/{path:path}", static),
            Route("/api/status", _json(Daemon, lambda _: operator.status())),
            Route("/api/sites", _json(list[Site], lambda _: list(operator.sites()))),
            Route("/api/runs", _json(list[Run], lambda _: list(operator.runs()))),
            Route("/api/runs/{run}", _json(Run, lambda r: operator.run(r.path_params["run"]))),
            Route(
                "/api/runs/{run}/rounds",
                _json(list[Round], lambda r: list(operator.rounds(r.path_params["run"]))),
            ),
            Route("/api/runs/{run}/rounds/{round:int}/kept/{strategy}/{name}", kept),
            Route("/api/events", events),
        ],
        middleware=[Middleware(Guard)],
        exception_handlers={FarflungError: _failed, HTTPException: _unrouted},
        lifespan=lifespan,
    )
    app.state.stream = stream
    return app


class Dashboard:
    """A dashboard that is being served; a context manager that stops it.

    Attributes:
        host: The address that it listens on.
        port: The port, also where 0 was asked for.
        url: What to open in a browser.
    """

    def __init__(self, app: Starlette, listener: socket.socket) -> None:
        self.host, self.port = listener.getsockname()[:2]
        shown = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"http://{shown}:{self.port}/"
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            loop="asyncio",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=2,
        )
        self._app = app
        self._listener = listener
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="dashboard", daemon=True)

    def _run(self) -> None:
        self._server.run(sockets=[self._listener])

    def start(self) -> Self:
        """Starts to answer; connections are accepted when this returns."""
        # The socket listens already, so whoever connects early waits instead of being refused.
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ends open streams, answers what was asked, and returns when the port is free."""
        if self._thread.is_alive():
            self._app.state.stream.end_soon()
            self._server.should_exit = True
            self._thread.join(START_S)
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops it."""
        self.stop()


def serve(operator: Operator, host: str = "127.0.0.1", port: int = 0) -> Dashboard:
    """Serves the page from a thread of this process.

    Args:
        operator: Where everything is read from.
        host: A loopback address, or ``localhost``.
        port: 0 takes a free one; :attr:`Dashboard.port` says which.

    Raises:
        ConfigInvalid: The address is not on loopback, or another process listens on it.
    """
    if not is_loopback(host):
        raise ConfigInvalid(
            f"dashboard.host is {host!r}: the dashboard asks for no credentials, so it listens on "
            "loopback only. Set it to 127.0.0.1 or ::1; from another machine open a tunnel with "
            "ssh -L 8080:127.0.0.1:PORT HOST.",
            key="dashboard.host",
            value=host,
        )
    address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(address), port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigInvalid(
            f"dashboard.port is {port}, and it can't be listened on at {address}: "
            f"{error.strerror}. Set it to another port, or to 0 for any free one.",
            key="dashboard.port",
            value=port,
        ) from error
    return Dashboard(create_app(operator), listener).start()
