"""What bulk passes through while a pace is kept: real sockets, and an HTTP proxy on the way."""

import json
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from site_agent.link.journal import Journal
from site_agent.link.throttle import Throttle
from site_agent.link.valve import Valve

DATA = bytes(range(256)) * 2000


def receive(connection: socket.socket, nbytes: int = 0) -> bytes:
    """So many bytes; all until the end for none."""
    out = b""
    while (not nbytes or len(out) < nbytes) and (part := connection.recv(1 << 16)):
        out += part
    return out


class Server:
    """Takes connections, one after the other, and serves each in the same way."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(serve,))
        self._thread.start()

    def _run(self, serve: Callable[[socket.socket], None]) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                serve(connection)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(10)


class Site:
    """A valve, and where it leads."""

    def __init__(self, folder: Path, address: str) -> None:
        self.log = folder / "agent.log"
        self.up, self.down = Throttle(), Throttle()
        self._path, journal = folder / "bulk.sock", Journal(self.log, "north")
        self._valve = Valve(self._path, lambda: address, self.up, self.down, journal)
        assert self._path.stat().st_mode & 0o777 == 0o600
        self._thread = threading.Thread(target=self._valve.run)
        self._thread.start()

    def dial(self) -> socket.socket:
        """As gRPC does."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect(self._valve.target.removeprefix("unix:"))
        return connection

    def warnings(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def close(self) -> None:
        self._valve.close()
        self._thread.join(10)
        assert not self._path.exists()


def echo(connection: socket.socket) -> None:
    connection.sendall(receive(connection, len(DATA)))


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(echo)
    yield server
    server.close()


@pytest.mark.parametrize("rate", [0.0, 4e6])
def test_bytes_pass_unchanged_both_ways(tmp_path: Path, server: Server, rate: float) -> None:
    site = Site(tmp_path, f"127.0.0.1:{server.port}")
    site.up.cap = site.down.cap = rate
    with site.dial() as connection:
        connection.sendall(DATA)
        assert receive(connection) == DATA  # and the far end's close comes through
    assert site.up.passed_bytes == site.down.passed_bytes == len(DATA)
    site.close()


def test_nobody_there_closes_the_connection_and_says_so(tmp_path: Path) -> None:
    unused = socket.create_server(("127.0.0.1", 0))
    address = f"127.0.0.1:{unused.getsockname()[1]}"
    unused.close()
    site = Site(tmp_path, address)
    with site.dial() as connection:
        assert receive(connection) == b""
    assert site.warnings()[0]["event"] == "the orchestrator can't be dialled"
    site.close()


class HttpProxy(Server):
    """Understands CONNECT, notes what it was asked, and echoes itself if it allows it."""

    def __init__(self, status: str) -> None:
        self.asked = b""
        self._status = status
        super().__init__(self._serve)

    def _serve(self, connection: socket.socket) -> None:
        while not self.asked.endswith(b"\r\n\r\n"):
            self.asked += connection.recv(1 << 16)
        connection.sendall(f"HTTP/1.1 {self._status}\r\nVia: test\r\n\r\n".encode())
        if self._status.startswith("200"):
            echo(connection)


@pytest.mark.parametrize("status", ["200 Connection established", "403 Forbidden"])
def test_an_http_proxy_of_the_environment_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    proxy = HttpProxy(status)
    monkeypatch.setenv("https_proxy", f"http://me:s%40f@127.0.0.1:{proxy.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    site = Site(tmp_path, "orchestrator.example:8470")
    with site.dial() as connection:
        if status.startswith("200"):
            connection.sendall(DATA)
            assert receive(connection) == DATA
        else:
            assert receive(connection) == b""
            assert status in site.warnings()[0]["reason"]
    lines = proxy.asked.decode().split("\r\n")
    assert lines[0] == "CONNECT orchestrator.example:8470 HTTP/1.1"
    assert f"Proxy-Authorization: Basic {b64encode(b'me:s@f').decode()}" in lines
    site.close()
    proxy.close()
