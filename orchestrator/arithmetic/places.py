"""Where bytes lie: an input of a reduction is a location, and a reader gives ranges of it.

A location is text: the absolute path of a file. Whoever adds another kind of place (objects behind
S3) adds a `Reader` and a line in `open_place`; nothing else knows where bytes are.
"""

from __future__ import annotations

import os
from typing import Protocol

from protos.errors import DataCorrupt


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


def open_place(location: str) -> Reader:
    """A reader of what lies at a location."""
    return LocalFile(location)


def read_range(location: str, start: int, stop: int) -> bytearray:
    """Some bytes of what lies at a location."""
    out = bytearray(stop - start)
    reader = open_place(location)
    try:
        reader.read_into(memoryview(out), start, stop)
    finally:
        reader.close()
    return out
