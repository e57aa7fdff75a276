"""Chunks of an artefact between files and the wire: written once, hashed once, resumable.

A `ChunkFile` receives chunks in any order into a file of the final size and remembers, in a small
file beside it, which of them are there and durable. It serves both directions: a site's download
and the orchestrator's spool.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from protos.digest import Bytes, digest
from protos.errors import DataCorrupt, ManifestInvalid
from protos.manifest import CHUNK_BYTES, Index

FLUSH_CHUNKS = 64
"""How many chunks may be lost from the record (not from the file) by a power cut."""


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: Bytes, mode: int = 0o644) -> None:
    """Write a small file so that it is either absent, old, or complete: write, fsync, rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)
    temporary.replace(path)
    sync_folder(path.parent)


class IndexWriter:
    """Writes an artefact's bytes in order into a file and hashes each chunk on the way.

    Args:
        path: A file that must not exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._pending = bytearray()
        self._chunks: list[str] = []
        self.nbytes = 0

    def write(self, data: Bytes) -> None:
        """Append some bytes."""
        view = memoryview(data).cast("B")
        self.nbytes += len(view)
        if self._pending:
            take = min(CHUNK_BYTES - len(self._pending), len(view))
            self._pending += view[:take]
            view = view[take:]
            if len(self._pending) == CHUNK_BYTES:
                self._emit(memoryview(self._pending))
                self._pending = bytearray()
        while len(view) >= CHUNK_BYTES:
            self._emit(view[:CHUNK_BYTES])
            view = view[CHUNK_BYTES:]
        if view:
            self._pending += view

    def _emit(self, chunk: memoryview) -> None:
        self._chunks.append(digest(chunk))
        while chunk:
            chunk = chunk[self._file.write(chunk) or 0 :]

    def finish(self, manifest_digest: str) -> Index:
        """Write what is pending, sync the file, and give the index of its bytes."""
        if self._pending:
            self._emit(memoryview(self._pending))
            self._pending = bytearray()
        os.fsync(self._file.fileno())
        self._file.close()
        return Index(manifest_digest, self.nbytes, tuple(self._chunks))

    def abort(self) -> None:
        """Close the file; the caller removes it."""
        self._file.close()


class ChunkFile:
    """A file that is being received chunk by chunk.

    Reopening the same path with the same index goes on where it was.

    Args:
        path: The file; beside it ``<name>.have`` holds one byte per chunk.
        index: What the file will be.
    """

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = path, index
        self._record = _record_of(path)
        known = _recorded(path, index)
        if known is None and self._record.exists():
            # It must never vouch for the file that is made now.
            self._record.unlink()
            sync_folder(path.parent)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if known is None:
            os.ftruncate(self._fd, 0)
            os.ftruncate(self._fd, index.nbytes)
            self._have = bytearray(len(index.chunks))
            self._save()
        else:
            self._have = known
        self._unsaved = 0

    def missing(self) -> list[tuple[int, int]]:
        """Half-open ranges of chunk numbers that are not here yet."""
        return ranges(i for i, have in enumerate(self._have) if not have)

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return all(self._have)

    @property
    def received_bytes(self) -> int:
        """Bytes that are here."""
        return sum(b - a for i, h in enumerate(self._have) if h for a, b in [self.index.span(i)])

    def write(self, number: int, data: Bytes) -> None:
        """Store one chunk.

        Raises:
            ManifestInvalid: The number or the size is out of range.
            DataCorrupt: The bytes don't have the digest of the index.
        """
        if not 0 <= number < len(self.index.chunks):
            raise ManifestInvalid(f"chunk {number} of {len(self.index.chunks)}")
        start, stop = self.index.span(number)
        if len(data) != stop - start:
            raise ManifestInvalid(f"chunk {number}: {len(data)} bytes where {stop - start} belong")
        if digest(data) != self.index.chunks[number]:
            raise DataCorrupt(f"chunk {number}: its bytes do not have the announced digest")
        view = memoryview(data)
        while view:
            written = os.pwrite(self._fd, view, start)
            view, start = view[written:], start + written
        self._have[number] = 1
        self._unsaved += 1
        if self._unsaved >= FLUSH_CHUNKS:
            self.sync()

    def sync(self) -> None:
        """Make everything received so far durable, the bytes before the record of them."""
        os.fdatasync(self._fd)
        self._save()

    def _save(self) -> None:
        write_durably(self._record, self.index.digest.encode() + bytes(self._have), 0o600)
        self._unsaved = 0

    def finish(self) -> None:
        """Sync and close a complete file and forget the record.

        Raises:
            DataCorrupt: Chunks are missing.
        """
        if not self.complete:
            raise DataCorrupt(f"{self.path.name}: chunks {self.missing()[:3]} are missing")
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._record.unlink(missing_ok=True)
        sync_folder(self.path.parent)

    def close(self) -> None:
        """Sync and close; what is here stays for the next time."""
        if self._fd >= 0:
            self.sync()
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Close and remove the file and its record."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> ChunkFile:
        """For ``with``."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


def _record_of(path: Path) -> Path:
    return path.with_name(path.name + ".have")


def _recorded(path: Path, index: Index) -> bytearray | None:
    """Which chunks of a file are here by its record; None if there is no record of this index."""
    try:
        known = _record_of(path).read_bytes()
    except FileNotFoundError:
        return None
    if known[:64] != index.digest.encode() or len(known) != 64 + len(index.chunks):
        return None
    return bytearray(known[64:]) if path.exists() else None


def missing_chunks(path: Path, index: Index) -> list[tuple[int, int]]:
    """What `ChunkFile.missing` would say, without a hand on the file: somebody may be writing it."""
    have = _recorded(path, index) or bytes(len(index.chunks))
    return ranges(i for i, here in enumerate(have) if not here)


def ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as half-open ranges."""
    out: list[tuple[int, int]] = []
    for number in numbers:
        if out and out[-1][1] == number:
            out[-1] = (out[-1][0], number + 1)
        else:
            out.append((number, number + 1))
    return out


def read_chunks(
    path: Path, index: Index, missing: Iterable[tuple[int, int]] = ()
) -> Iterator[tuple[int, bytes]]:
    """The chunks of a file: (number, bytes); all of them if no ranges are given.

    Raises:
        ManifestInvalid: A range is out of bounds.
    """
    wanted = list(missing) or [(0, len(index.chunks))]
    with path.open("rb", buffering=0) as file:
        for first, end in wanted:
            if not 0 <= first <= end <= len(index.chunks):
                raise ManifestInvalid(f"chunks {first} to {end} of {len(index.chunks)}")
            for number in range(first, end):
                start, stop = index.span(number)
                data = os.pread(file.fileno(), stop - start, start)
                if len(data) != stop - start:
                    raise ManifestInvalid(f"{path.name} ends before chunk {number}")
                yield number, data
