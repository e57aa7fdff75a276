"""Chunks of an artefact between files and the wire: written once, hashed once, resumable.

A `ChunkFile` receives chunks in any order into a file of the final size and knows after every
accident which of them are there. It serves both directions: a site's download and the
orchestrator's spool.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType

from protos.digest import Bytes, digest, hasher
from protos.errors import DataCorrupt, ManifestInvalid
from protos.faults import reach
from protos.manifest import CHUNK_BYTES, Index
from protos.spares import Spares
from protos.write_behind import write_behind

SMALL_BYTES = 64 << 10
"""Pieces below this are put together before they are written."""

SAVE_CHUNKS = 256
"""How many chunks of a long transfer a power cut may lose."""


def sync_folder(path: Path) -> None:
    """Make renames and new names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    reach("folder.opened")
    try:
        os.fsync(fd)
        reach("folder.synced")
    finally:
        os.close(fd)


def sync_tree(path: Path) -> None:
    """Make a folder with all that is in it durable."""
    for child in path.iterdir():
        if child.is_dir():
            sync_tree(child)
            continue
        fd = os.open(child, os.O_RDONLY)
        try:
            os.fsync(fd)
            reach("tree.file.synced")
        finally:
            os.close(fd)
    sync_folder(path)


def write_durably(path: Path, data: Bytes, mode: int = 0o644) -> None:
    """Write a small file so that it is either absent, old, or complete: write, fsync, rename."""
    reach("document.writing")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        reach("document.written")
        os.fsync(fd)
        reach("document.synced")
    finally:
        os.close(fd)
    temporary.replace(path)
    reach("document.renamed")
    sync_folder(path.parent)
    reach("document.named")


class IndexWriter:
    """Writes an artefact's bytes in order into a file and hashes each chunk on the way.

    Args:
        path: A file that must not exist.
        spares: Where a file to write over may be found.
        nbytes: How large it will be, if that is known; for the choice among the spares.
    """

    def __init__(self, path: Path, spares: Spares | None = None, nbytes: int = 0) -> None:
        if path.exists():
            raise FileExistsError(f"{path} is there already")
        reused = spares is not None and spares.take(path, nbytes)
        reach("artefact.begun")
        raw = path.open("r+b" if reused else "xb", buffering=0)
        self._file = io.BufferedWriter(raw, SMALL_BYTES)
        self._hasher, self._filled = hasher(), 0
        self._chunks: list[str] = []
        self.nbytes = 0

    def write(self, data: Bytes) -> None:
        """Append some bytes."""
        view = memoryview(data).cast("B")
        self.nbytes += len(view)
        while view:
            part = view[: CHUNK_BYTES - self._filled]
            self._hasher.update(part)
            self._file.write(part)
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == CHUNK_BYTES:
                self._end_chunk()

    def _end_chunk(self) -> None:
        start = len(self._chunks) * CHUNK_BYTES
        write_behind(self._file.fileno(), start, start + self._filled)
        reach("artefact.chunk.written")
        self._chunks.append(self._hasher.hexdigest())
        self._hasher, self._filled = hasher(), 0

    def finish(self, manifest_digest: str) -> Index:
        """Write what is pending and give the index of its bytes. Whoever names the file syncs it."""
        if self._filled:
            self._end_chunk()
        self._file.flush()
        reach("artefact.flushed")
        os.ftruncate(self._file.fileno(), self.nbytes)
        self._file.close()
        return Index(manifest_digest, self.nbytes, tuple(self._chunks))

    def abort(self) -> None:
        """Close the file; the caller removes it."""
        self._file.close()


class ChunkFile:
    """A file that is being received chunk by chunk, as ``<name>.part`` until it is complete.

    Opened again with the same index, it goes on where it was. Which chunks are there stands in
    ``<name>.have`` after a transfer that was interrupted, and after every `SAVE_CHUNKS` of a long
    one; chunks behind those of the record (their process was killed) are known by their digests.

    Args:
        path: Where the complete file will be.
        index: What it will be.
        spares: Where a file to write over may be found.
        verify: Whether to look at what the record says is there: for the first time in a process,
            since a disk may damage what it held meanwhile.
        durable: Whether the complete file is synced before it gets its name (the folder is not:
            after a power cut it may have either name). If not, other bytes may be behind it then.
    """

    def __init__(
        self,
        path: Path,
        index: Index,
        spares: Spares | None = None,
        *,
        verify: bool = False,
        durable: bool = True,
    ) -> None:
        self.path, self.index, self._durable = path, index, durable
        self._part, self._record = part_of(path), _record_of(path)
        found = self._part.exists()
        # It was complete, and whoever wanted it died before taking it; or it is to be looked at again.
        whole = not found and path.exists()
        if whole:
            path.rename(self._part)
            reach("part.taken_up")
        elif not found:
            if self._record.exists():
                # It must never vouch for the file that is made now.
                self._record.unlink()
                reach("part.old_record.removed")
                sync_folder(path.parent)
            if spares is not None:
                spares.take(self._part, index.nbytes)
        self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o600)
        size = os.fstat(self._fd).st_size
        if size != index.nbytes:
            os.ftruncate(self._fd, index.nbytes)
            reach("part.made")
        self._have = (_recorded(path, index) if found else None) or bytearray(len(index.chunks))
        self._unsaved = 0
        if whole and size == index.nbytes:
            self._have = bytearray(b"\1" * len(index.chunks))
        if verify or whole:
            self._have = bytearray(
                here and self._is_right(number) for number, here in enumerate(self._have)
            )
        if found and size == index.nbytes:
            self._find_more()
        self.received_bytes = sum(
            b - a for i, here in enumerate(self._have) if here for a, b in [index.span(i)]
        )
        """Bytes that are here."""

    def _find_more(self) -> None:
        """Look for chunks that were written after the record was; they came in ascending order."""
        for number, here in enumerate(self._have):
            if here:
                continue
            if not self._is_right(number):
                return
            self._have[number] = 1
            self._unsaved += 1

    def _is_right(self, number: int) -> bool:
        start, stop = self.index.span(number)
        return digest(os.pread(self._fd, stop - start, start)) == self.index.chunks[number]

    def missing(self) -> list[tuple[int, int]]:
        """Half-open ranges of chunk numbers that are not here yet."""
        return ranges(i for i, have in enumerate(self._have) if not have)

    @property
    def complete(self) -> bool:
        """Whether every chunk is here."""
        return self.received_bytes == self.index.nbytes

    def write(self, number: int, data: Bytes) -> None:
        """Store one chunk.

        Raises:
            ManifestInvalid: The number or the size is out of range.
            DataCorrupt: The bytes don't have the digest of the index.
        """
        if not 0 <= number < len(self.index.chunks):
            raise ManifestInvalid(f"chunk {number} of {len(self.index.chunks)}")
        start, stop = self.index.span(number)
        size = stop - start
        if len(data) != size:
            raise ManifestInvalid(f"chunk {number}: {len(data)} bytes where {size} belong")
        if digest(data) != self.index.chunks[number]:
            raise DataCorrupt(f"chunk {number}: its bytes do not have the announced digest")
        view, at = memoryview(data), start
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written
        if self._durable:
            write_behind(self._fd, start, stop)
        reach("part.chunk.written")
        if not self._have[number]:
            self._have[number] = 1
            self.received_bytes += size
        self._unsaved += 1
        if self._unsaved >= SAVE_CHUNKS:
            self.save()

    def save(self) -> None:
        """Make everything received so far durable, the bytes before the record of them."""
        os.fdatasync(self._fd)
        reach("part.synced")
        write_durably(self._record, self.index.digest.encode() + bytes(self._have), 0o600)
        reach("part.recorded")
        self._unsaved = 0

    def finish(self) -> None:
        """Close a complete file, give it its name, and forget the record.

        Raises:
            DataCorrupt: Chunks are missing.
        """
        if not self.complete:
            raise DataCorrupt(f"{self.path.name}: chunks {self.missing()[:3]} are missing")
        if self._durable:
            os.fdatasync(self._fd)
            reach("part.whole.synced")
        os.close(self._fd)
        self._fd = -1
        self._part.rename(self.path)
        reach("part.renamed")
        self._record.unlink(missing_ok=True)
        reach("part.forgotten")

    def close(self) -> None:
        """Sync and close; what is here stays for the next time."""
        if self._fd >= 0:
            if self._unsaved:
                self.save()
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Close and remove the file and its record."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._record.unlink(missing_ok=True)
        self._part.unlink(missing_ok=True)
        reach("part.discarded")

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


def part_of(path: Path) -> Path:
    """Where a file is while it is being received."""
    return path.with_name(path.name + ".part")


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
    return bytearray(known[64:])


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
                yield number, read_chunk_of(file.fileno(), index, number)


def read_chunk_of(fd: int, index: Index, number: int) -> bytes:
    """One chunk of an open file.

    Raises:
        ManifestInvalid: The file ends before.
    """
    start, stop = index.span(number)
    data = os.pread(fd, stop - start, start)
    if len(data) != stop - start:
        raise ManifestInvalid(
            f"the file of artefact {index.digest[:12]} ends before chunk {number}"
        )
    return data
