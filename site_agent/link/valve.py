"""The valve: bulk connections pass through it while a cap is set, at the cap's pace.

gRPC writes a message of a megabyte in one go and reads ahead, so a pace kept between messages would
be none on the wire. Instead gRPC dials a Unix socket in the site's folder, and the bytes behind it,
which are TLS between gRPC and the orchestrator and stay so, go on in small pieces.
"""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from site_agent.link.journal import Journal
from site_agent.link.throttle import MOST_PIECE, PIECE_S, Throttle
from site_agent.link.wire import host_of, is_loopback

AHEAD_S = 0.25
"""What the kernel may receive ahead of the pace: as much as a round trip of that length needs."""

LEAST_AHEAD = LEAST_UNSENT = 8 << 10
DIAL_S, AGAIN_S = 20.0, 1.0
MOST_ANSWER = 64 << 10


class Valve:
    """A Unix socket and what lies between it and the orchestrator.

    Args:
        path: Of the socket; its folder must be private.
        address: Gives host:port of the orchestrator.
        up: Pace towards the orchestrator.
        down: Pace from it.
        journal: Log.
    """

    def __init__(
        self,
        path: Path,
        address: Callable[[], str],
        up: Throttle,
        down: Throttle,
        journal: Journal,
    ) -> None:
        self._path, self._address, self._up, self._down = path, address, up, down
        self._journal, self._closed = journal, threading.Event()
        path.unlink(missing_ok=True)
        # A socket's path may have 107 bytes at most, a folder's any number: go through /proc.
        self._folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self._place)
        path.chmod(0o600)
        self._socket.listen(8)

    @property
    def _place(self) -> str:
        return f"/proc/self/fd/{self._folder}/{self._path.name}"

    @property
    def target(self) -> str:
        """What gRPC dials."""
        return f"unix:{self._place}"

    def run(self) -> None:
        """Pass on until closed."""
        while True:
            try:
                near, _ = self._socket.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                self._journal.error("the valve takes no connection", reason=str(error))
                self._closed.wait(AGAIN_S)  # too many open files, perhaps
                continue
            threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections; those that are open end with gRPC's."""
        self._closed.set()
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()
        self._path.unlink(missing_ok=True)
        os.close(self._folder)

    def _connect(self, near: socket.socket) -> None:
        with near:
            try:
                far = dial(self._address(), self._down.bytes_per_s)
                _send_no_further_ahead(far, self._up.bytes_per_s)
            except OSError as error:
                self._journal.warning("the orchestrator can't be dialled", reason=str(error))
                return
            with far:
                back = threading.Thread(target=_pass_on, args=(far, near, self._down), daemon=True)
                back.start()
                _pass_on(near, far, self._up)
                back.join()


def _pass_on(source: socket.socket, target: socket.socket, throttle: Throttle) -> None:
    """Pass bytes on until one of the ends closes, and close both then."""
    buffer = memoryview(bytearray(MOST_PIECE))
    try:
        while count := source.recv_into(buffer[: throttle.piece]):
            throttle.take(count)
            target.sendall(buffer[:count])
    except OSError:
        pass
    for end in (source, target):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed


def _send_no_further_ahead(far: socket.socket, bytes_per_s: float) -> None:
    """Keep in the kernel what a pace needs; more would hide from us that the line is slower."""
    if bytes_per_s:
        unsent = max(LEAST_UNSENT, int(bytes_per_s * 2 * PIECE_S))
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, unsent)


def dial(address: str, down_bytes_per_s: float = 0.0) -> socket.socket:
    """A TCP connection, through the HTTP proxy of the environment where gRPC would use it.

    Args:
        address: host:port of the orchestrator.
        down_bytes_per_s: Pace at which will be read; 0 for none.

    Raises:
        OSError: It can't be made.
    """
    host, port = host_of(address), int(address.rpartition(":")[2])
    proxy = urllib.request.getproxies().get("https")
    if not proxy or is_loopback(address) or urllib.request.proxy_bypass(host):
        return _connect(host, port, down_bytes_per_s)
    place = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    if not place.hostname:
        raise OSError(f"https_proxy: {proxy} names no host")
    connection = _connect(place.hostname, place.port or 80, down_bytes_per_s)
    try:
        _ask_proxy(connection, f"{host}:{port}", unquote(place.netloc.rpartition("@")[0]))
    except OSError:
        connection.close()
        raise
    return connection


def _ask_proxy(connection: socket.socket, address: str, credentials: str) -> None:
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if credentials:
        lines.append(f"Proxy-Authorization: Basic {b64encode(credentials.encode()).decode()}")
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):  # byte by byte: what follows is not ours
        byte = connection.recv(1)
        if not byte or len(answer) > MOST_ANSWER:
            raise OSError("the HTTP proxy broke off")
        answer += byte
    status = answer.split(b"\r\n", 1)[0].decode("latin-1")
    if status.split(" ")[1:2] != ["200"]:
        raise OSError(f"the HTTP proxy refuses: {status}")


def _connect(host: str, port: int, down_bytes_per_s: float) -> socket.socket:
    problem = OSError(f"{host} has no address")
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(DIAL_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if down_bytes_per_s:
                # Before it connects, or the window is not bound by it. The kernel takes it twice.
                ahead = max(LEAST_AHEAD, int(down_bytes_per_s * AHEAD_S / 2))
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, ahead)
            connection.connect(place)
            connection.settimeout(None)
            return connection
        except OSError as error:
            connection.close()
            problem = error
    raise problem
