"""A TCP forwarder between sites and a daemon: it counts, and it fails in the ways of a network.

It cuts connections, refuses them, is slow or late, goes silent without closing anything, and flips,
doubles or swaps bytes. TLS goes through it untouched, so what is done to a byte ends its connection.
Set `network.address` in a site's site.toml to `Proxy.address`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType
from typing import Any, Literal

READ_BYTES = 64 << 10
LEAST_PIECE = 1448
"""What one packet carries: a slow line must not move in coarser steps than a real one."""
AHEAD_BYTES = 64 << 10
"""What the kernel may hold of a connection on either side: the proxy must not look like a large modem."""
SLOW_PIECES = 32
"""Pieces of one connection that may wait before the bottleneck, as its window would allow."""
RESET_ON_CLOSE = struct.pack("ii", 1, 0)

Mischief = Literal["corrupt", "duplicate", "reorder"]
"""Done to one piece on its way: a bit flipped, the piece twice, its halves swapped."""
Way = Literal["up", "down", "both"]
"""From the site, to the site."""


@dataclass
class Direction:
    """One direction of the line that all connections share.

    Attributes:
        bytes_per_s: The bottleneck's rate; 0 for none. May be changed at any time.
        queue_bytes: What may wait before the bottleneck, in order of arrival whatever the connection.
            What finds no room is not read, as a sender's window would close.
        nbytes: Bytes that came in from the sender, of connections that were cut too.
        delay_s: How much later everything arrives. May be changed at any time.
        moments: When bytes went on to the receiver, and how many.
        flowing: Whether anything is forwarded, and any end of a connection told.
    """

    bytes_per_s: float = 0.0
    queue_bytes: int = 64 << 10
    delay_s: float = 0.0
    nbytes: int = 0
    moments: list[tuple[float, int]] = field(default_factory=list)
    flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _waiting: list[tuple[int, threading.Event]] = field(default_factory=list)
    _busy_until: float = 0.0
    _entry: asyncio.Lock = field(default_factory=asyncio.Lock)
    _mischief: list[tuple[int, Mischief, threading.Event]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.flowing.set()

    def slow(self, mbit_per_s: float, queue_bytes: int = 64 << 10) -> None:
        """From now on the line carries this much."""
        self.bytes_per_s, self.queue_bytes = mbit_per_s * 1e6 / 8, queue_bytes

    def meddle(self, how: Mischief, after: int = 0) -> threading.Event:
        """Do something to the piece after so many more bytes; gives what tells that it is done."""
        done = threading.Event()
        self._mischief.append((self.nbytes + after, how, done))
        return done

    def mend(self) -> None:
        """No rate, no delay, no mischief any more."""
        self.bytes_per_s = self.delay_s = 0.0
        self._mischief.clear()

    def windows(self, seconds: float, begin: float, end: float) -> list[int]:
        """Bytes in each whole window between two times of the monotonic clock, sliding by a tenth."""
        step, starts = seconds / 10, []
        while begin + seconds <= end:
            starts.append(begin)
            begin += step
        moments = list(self.moments)
        return [sum(n for t, n in moments if start <= t < start + seconds) for start in starts]

    def await_bytes(self, nbytes: int, timeout_s: float) -> None:
        """Wait until so many more bytes came in.

        Raises:
            TimeoutError: They did not.
        """
        reached = threading.Event()
        self._waiting.append((self.nbytes + nbytes, reached))
        if not reached.wait(timeout_s):
            raise TimeoutError(f"{nbytes} more bytes did not come in {timeout_s} s")

    def count(self, nbytes: int) -> None:
        """Bytes came in from the sender."""
        self.nbytes += nbytes
        for entry in [e for e in self._waiting if e[0] <= self.nbytes]:
            self._waiting.remove(entry)
            entry[1].set()

    def piece(self) -> int:
        """How much to read at once: a fiftieth of a second of a slow line."""
        if not self.bytes_per_s:
            return READ_BYTES
        return max(LEAST_PIECE, min(READ_BYTES, int(self.bytes_per_s / 50)))

    @property
    def pieces(self) -> int:
        """How many pieces of a connection may be on their way."""
        return SLOW_PIECES if self.bytes_per_s or self.delay_s else 1

    def passed(self, data: bytes) -> bytes:
        """What becomes of a piece that just came."""
        for entry in [e for e in self._mischief if e[0] < self.nbytes and data]:
            self._mischief.remove(entry)
            half = len(data) // 2
            match entry[1]:
                case "corrupt":
                    data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
                case "duplicate":
                    data += data
                case "reorder":
                    data = data[half:] + data[:half]
            entry[2].set()
        return data

    async def enter(self, nbytes: int) -> float:
        """Wait for room in the queue; when the bytes will be through."""
        async with self._entry:  # first come, first served
            while rate := self.bytes_per_s:
                wait = (nbytes - self.queue_bytes) / rate + self._busy_until - monotonic()
                if wait <= 0 or self._busy_until <= monotonic():
                    break
                await asyncio.sleep(min(wait, 0.1))
            now = monotonic()
            self._busy_until = max(now, self._busy_until) + nbytes / rate if rate else now
            return self._busy_until + self.delay_s


class Line(asyncio.Queue[tuple[float, bytes]]):
    """Bytes on their way in one direction of one connection, and when each comes out."""

    def __init__(self, direction: Direction) -> None:
        super().__init__()
        self._direction = direction

    def full(self) -> bool:
        """Whether no more may be on its way just now."""
        return self.qsize() >= self._direction.pieces


@dataclass(eq=False)
class Connection:
    """One connection through the proxy; bytes in each direction."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    up: int = 0
    down: int = 0

    def reset(self) -> None:
        for writer in self.writers:
            raw = writer.get_extra_info("socket")
            if raw is not None and raw.fileno() >= 0:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()


class Proxy:
    """Listens on loopback while it is entered.

    Args:
        target: host:port of the daemon.
        port: Where to listen; 0 for any.
    """

    def __init__(self, target: str, port: int = 0) -> None:
        self.target, self.port = target, port
        self.up, self.down = Direction(), Direction()
        self.connections: list[Connection] = []
        self.cuts = 0
        self._open: set[Connection] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    @property
    def address(self) -> str:
        """host:port where sites dial."""
        return f"127.0.0.1:{self.port}"

    @property
    def open(self) -> list[Connection]:
        """Connections that are there now."""
        return list(self._open)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        """Reset every connection; new ones are let through."""
        self._run(self._cut())

    def cut_every(self, seconds: float) -> Callable[[], None]:
        """Cut again and again; gives what ends it."""

        async def again() -> None:
            while True:
                await asyncio.sleep(seconds)
                await self._cut()

        future = asyncio.run_coroutine_threadsafe(again(), self._loop)

        def end() -> None:
            future.cancel()

        return end

    def sever(self) -> None:
        """Reset every connection and refuse new ones, until `mend`."""
        self._run(self._sever())

    def freeze(self, way: Way = "both") -> None:
        """Forward nothing more and close nothing, until `mend`: a half-open connection.

        Both ends may write until their windows are full. New connections are taken and go nowhere.
        """
        self._run(self._flow(way, False))

    def mend(self) -> None:
        """An honest and fast line again; what was frozen goes on where it was."""
        self.up.mend()
        self.down.mend()
        self._run(self._flow("both", True))
        self._run(self._listen())

    # -- on the loop -------------------------------------------------------------------------------

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _listen(self) -> None:
        if self._server is not None:
            return
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self.port, limit=READ_BYTES
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _sever(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _flow(self, way: Way, on: bool) -> None:
        for name, direction in (("up", self.up), ("down", self.down)):
            if way in (name, "both"):
                (direction.flowing.set if on else direction.flowing.clear)()

    async def _close(self) -> None:
        await self._flow("both", True)
        await self._sever()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    async def _cut(self) -> None:
        self.cuts += 1
        for connection in self.open:
            connection.reset()

    async def _accept(self, near: asyncio.StreamReader, to_site: asyncio.StreamWriter) -> None:
        before = self.cuts
        await self.up.flowing.wait()
        host, _, port = self.target.rpartition(":")
        try:
            far, to_daemon = await asyncio.open_connection(host, int(port), limit=READ_BYTES)
        except OSError:
            to_site.transport.abort()
            return
        for end in (to_site, to_daemon):
            end.transport.set_write_buffer_limits(0)
            raw = end.get_extra_info("socket")
            for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                raw.setsockopt(socket.SOL_SOCKET, buffer, AHEAD_BYTES)
        connection = Connection((to_site, to_daemon))
        self.connections.append(connection)
        self._open.add(connection)
        if self.cuts != before:  # while it was made
            connection.reset()
        ways = (("up", self.up, near, to_daemon), ("down", self.down, far, to_site))
        tasks = []
        for way, direction, reader, writer in ways:
            line = Line(direction)
            arrive = self._arrive(connection, way, direction, reader, line)
            tasks += [
                asyncio.create_task(arrive),
                asyncio.create_task(_leave(line, direction, writer)),
            ]
        try:
            await asyncio.gather(*tasks)
        except OSError:
            connection.reset()
        finally:
            for task in tasks:
                task.cancel()
            for writer in connection.writers:
                writer.close()
            self._open.discard(connection)

    @staticmethod
    async def _arrive(
        connection: Connection,
        way: str,
        direction: Direction,
        reader: asyncio.StreamReader,
        line: Line,
    ) -> None:
        data = b"start"
        while data:
            try:
                data = await reader.read(direction.piece())
            except OSError:
                await direction.flowing.wait()
                raise
            await direction.flowing.wait()
            direction.count(len(data))
            setattr(connection, way, getattr(connection, way) + len(data))
            data = direction.passed(data)
            await line.put((await direction.enter(len(data)), data))


async def _leave(line: Line, direction: Direction, writer: asyncio.StreamWriter) -> None:
    data = b"start"
    while data:
        due, data = await line.get()
        if (wait := due - monotonic()) > 0:
            await asyncio.sleep(wait)
        await direction.flowing.wait()
        writer.write(data)
        await writer.drain()
        direction.moments.append((monotonic(), len(data)))
    if writer.can_write_eof():
        writer.write_eof()
