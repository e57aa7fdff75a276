"""What a run of tiles writes: its part of an artefact's file, hashed while it goes by."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from protos.digest import hasher
from protos.manifest import ALIGNMENT, CHUNK_BYTES
from protos.write_behind import write_behind


def release_pages(path: str, start: int, stop: int) -> None:
    """Let go of the memory in which the kernel keeps a part of a file that nobody reads soon.

    What is written next is then written onto these pages. A virtual machine may have to ask its host
    for others, which costs ten times as much as the writing (docs/evidence.md).

    Args:
        path: The file; nothing happens if it is gone, and nothing is lost if it is read again.
        start: First byte.
        stop: One past the last.
    """
    with suppress(FileNotFoundError), open(path, "rb") as file:  # noqa: PTH123
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


class Output:
    """A part of an artefact's file, written from front to back.

    The file has its full size from the start, so that padding between tensors is there already.
    Chunks that lie wholly in the part are hashed as they are written; the one at either end, shared
    with the next part, is hashed by whoever joins them.

    Args:
        path: The file.
        nbytes: Its size.

    Attributes:
        chunks: Number and digest of each chunk that is complete.
    """

    def __init__(self, path: str, nbytes: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        self._nbytes = nbytes
        self._at = -1
        self._hasher: Any = None
        self.chunks: list[tuple[int, str]] = []

    def write(self, data: memoryview, at: int) -> None:
        """Write some bytes behind those before, with at most a tensor's padding in between."""
        if self._at < 0:
            self._at = at
            self._hasher = hasher() if at % CHUNK_BYTES == 0 else None
        self._hash(memoryview(bytes(at - self._at)))
        self._hash(data)
        start = at
        while data:
            written = os.pwrite(self._fd, data, at)
            data, at = data[written:], at + written
        write_behind(self._fd, start, at)

    def _hash(self, data: memoryview) -> None:
        while data:
            size = min(len(data), CHUNK_BYTES - self._at % CHUNK_BYTES)
            if self._hasher is not None:
                self._hasher.update(data[:size])
            data, self._at = data[size:], self._at + size
            if self._at % CHUNK_BYTES == 0 or self._at == self._nbytes:
                if self._hasher is not None:
                    number = (self._at - 1) // CHUNK_BYTES
                    self.chunks.append((number, self._hasher.hexdigest()))
                self._hasher = hasher()

    def close(self, *, sync: bool = False) -> None:
        """Close the file; with ``sync`` the bytes are durable, and the last chunk is complete."""
        if sync:
            rest = self._nbytes - self._at
            if self._at >= 0 and rest < ALIGNMENT:  # the padding of the last tensor
                self._hash(memoryview(bytes(rest)))
            os.fsync(self._fd)
        os.close(self._fd)
