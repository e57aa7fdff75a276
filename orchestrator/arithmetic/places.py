"""Where bytes lie: an input of a reduction is a location, and a reader gives ranges of it.

A location is text: the absolute path of a file, or a signed URL of an object in a bucket. Whoever adds
another kind of place adds a `Reader` and a line in `open_place`; nothing else knows where bytes are.
"""

from __future__ import annotations

import os
import time
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Protocol
from urllib.parse import urlsplit

from protos.errors import DataCorrupt, NotFound, Unavailable

WINDOW_BYTES = 2 << 20
"""What a request to an object store asks for at least: half of one takes as long. Each source of a
reduction holds one."""

TRIES = 4
"""Of one request, a second apart and then twice as long each."""

TIMEOUT_S = 60.0


class Reader(Protocol):
    """Ranges of something that does not change while it is read."""

    def read_into(self, buffer: memoryview, start: int, stop: int) -> None:
        """Fill ``buffer`` (``stop - start`` bytes) with the bytes from ``start`` to before ``stop``.

        Raises:
            DataCorrupt: There are not so many.
        """
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class LocalFile:
    """A file on this machine or on a file system that all nodes share.

    Args:
        path: Absolute.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read_into(self, buffer: memoryview, start: int, stop: int) -> None:
        """See `Reader.read_into`."""
        while start < stop:  # one read gives at most 2 GiB
            got = os.preadv(self._fd, [buffer], start)
            if not got:
                raise DataCorrupt(f"{self._path}: it ends at byte {start}, {stop} were expected")
            buffer, start = buffer[got:], start + got

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class RemoteObject:
    """An object behind a URL that carries its own permission; only ranges of it are read.

    Args:
        url: Signed; no message shows more of it than the path.
    """

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)
        self._connection: HTTPConnection | None = None
        self._window = memoryview(b"")
        self._at = 0  # where the window begins

    def read_into(self, buffer: memoryview, start: int, stop: int) -> None:
        """See `Reader.read_into`.

        Raises:
            NotFound: The object is gone.
            Unavailable: The object store can't be reached, or does not accept the URL any more.
        """
        while start < stop:
            if not self._at <= start < self._at + len(self._window):
                self._window = self._asked(start, start + WINDOW_BYTES)
                self._at = start
            held = self._window[start - self._at : stop - self._at]
            buffer[: len(held)] = held
            buffer, start = buffer[len(held) :], start + len(held)

    def _asked(self, start: int, stop: int) -> memoryview:
        problem = ""
        for n in range(TRIES):
            if n:
                time.sleep(2 ** (n - 1))
            try:
                response = self._request(start, stop)
                data = response.read()
            except (OSError, HTTPException) as error:
                problem = str(error) or type(error).__name__
                self.close()
                continue
            if response.status == 206 and data:
                return memoryview(data)
            if response.status == 416:
                raise DataCorrupt(f"{self._url.path}: it ends before byte {start}")
            if response.status == 404:
                raise NotFound(f"{self._url.path}: the object is gone")
            problem = f"status {response.status} {response.reason}"
            if response.status < 500:  # the same request will not do better
                break
        raise Unavailable(
            f"{self._url.hostname}: {self._url.path} can't be read: {problem}. The round goes on when"
            " the object store answers"
        )

    def _request(self, start: int, stop: int) -> HTTPResponse:
        if self._connection is None:
            kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
            self._connection = kind(self._url.netloc, timeout=TIMEOUT_S)
        target = f"{self._url.path}?{self._url.query}"
        self._connection.request("GET", target, headers={"Range": f"bytes={start}-{stop - 1}"})
        return self._connection.getresponse()

    def close(self) -> None:
        """Close the connection; the next read opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def open_place(location: str) -> Reader:
    """A reader of what lies at a location."""
    if location.startswith(("https://", "http://")):
        return RemoteObject(location)
    return LocalFile(location)
