"""What is written at length is on its way to the disk before anybody syncs."""

import ctypes
import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.arithmetic.output import Output
from protos.chunks import ChunkFile, IndexWriter
from protos.digest import digest
from protos.manifest import CHUNK_BYTES, Index, Manifest
from protos.write_behind import STRETCH_BYTES, write_behind
from tests.support.workbench import of_spec

PAGE = os.sysconf("SC_PAGE_SIZE")
CACHESTAT = 451  # asm-generic/unistd.h, since Linux 6.5
MANIFEST = Manifest((of_spec("w", (1,)),))


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Pages(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writing", "evicted", "evicted_lately")
    )


def dirty(path: Path, start: int, stop: int) -> int:
    """Pages of a part of a file that nobody has begun to write to the disk."""
    pages, part = _Pages(), _Range(start, stop - start)
    with path.open("rb") as file:
        failed = ctypes.CDLL(None, use_errno=True).syscall(
            CACHESTAT, file.fileno(), ctypes.byref(part), ctypes.byref(pages), 0
        )
    if failed:
        pytest.skip(f"this kernel does not tell: {os.strerror(ctypes.get_errno())}")
    return int(pages.dirty)


Written = tuple[Path, Callable[[], object]]
"""A file that is under way, and what ends it."""


def by_index_writer(path: Path, chunks: list[bytes]) -> Written:
    writer = IndexWriter(path)
    for chunk in chunks:
        writer.write(chunk)
    return path, lambda: writer.finish(MANIFEST.digest)


def by_chunk_file(path: Path, chunks: list[bytes]) -> Written:
    names = tuple(digest(chunk) for chunk in chunks)
    file = ChunkFile(path, Index(MANIFEST.digest, sum(map(len, chunks)), names))
    for number, chunk in enumerate(chunks):
        file.write(number, chunk)
    return path.with_name(path.name + ".part"), file.finish


def by_reducer(path: Path, chunks: list[bytes]) -> Written:
    nbytes = sum(map(len, chunks))
    path.touch()
    os.truncate(path, nbytes)
    output = Output(str(path), nbytes)
    for number, chunk in enumerate(chunks):
        output.write(memoryview(chunk), number * CHUNK_BYTES)
    return path, lambda: output.close(sync=True)


@pytest.mark.parametrize("write", [by_index_writer, by_chunk_file, by_reducer])
def test_large_files_are_on_their_way_before_they_are_synced(
    tmp_path: Path, write: Callable[[Path, list[bytes]], Written]
) -> None:
    chunks = [os.urandom(CHUNK_BYTES) for _ in range(2 * STRETCH_BYTES // CHUNK_BYTES + 1)]
    probe = tmp_path / "probe"
    with probe.open("wb", buffering=0) as file:
        file.write(bytes(PAGE))
        os.fsync(file.fileno())
    if dirty(probe, 0, PAGE):
        pytest.skip("this file system has no disk behind it")
    path, finish = write(tmp_path / "file", chunks)
    # What the C library or Python still holds back of a stretch's end is the sync's.
    assert dirty(path, 0, 2 * STRETCH_BYTES) < 0.05 * 2 * STRETCH_BYTES / PAGE
    finish()
    assert (tmp_path / "file").read_bytes() == b"".join(chunks)


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The parts of files that the kernel is asked to write: first byte and one past the last."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "protos.write_behind._sync_file_range",
        lambda fd, start, nbytes, flags: found.append((start, start + nbytes)),
    )
    return found


def test_what_is_not_needed_after_a_power_cut_is_not_hurried(
    tmp_path: Path, handed_over: list[tuple[int, int]]
) -> None:
    chunk = os.urandom(CHUNK_BYTES)
    count = STRETCH_BYTES // CHUNK_BYTES
    index = Index(MANIFEST.digest, STRETCH_BYTES, (digest(chunk),) * count)
    for durable, expected in ((False, []), (True, [(0, STRETCH_BYTES)])):
        with ChunkFile(tmp_path / f"{durable}", index, durable=durable) as file:
            for number in range(count):
                file.write(number, chunk)
        assert handed_over == expected


def test_each_stretch_is_handed_over_once_it_has_ended(
    handed_over: list[tuple[int, int]],
) -> None:
    edges = [0, 5, STRETCH_BYTES - 1, STRETCH_BYTES, STRETCH_BYTES + 9, 4 * STRETCH_BYTES + 1]
    for start, stop in pairwise(edges):
        write_behind(0, start, stop)
    assert handed_over == [(0, STRETCH_BYTES), (STRETCH_BYTES, 4 * STRETCH_BYTES)]


def test_a_file_that_cannot_be_written_back_is_none_of_its_business() -> None:
    reading, writing = os.pipe()
    write_behind(writing, 0, STRETCH_BYTES)
    os.close(reading)
    os.close(writing)
