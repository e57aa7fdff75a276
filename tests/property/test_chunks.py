"""Files that arrive in chunks: any order, any interruption, and never a byte that was not announced."""

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from protos import chunks as chunks_module
from protos.chunks import (
    ChunkFile,
    IndexWriter,
    ranges,
    read_chunks,
    write_durably,
)
from protos.digest import digest
from protos.errors import DataCorrupt, ManifestInvalid
from protos.manifest import CHUNK_BYTES, Index
from protos.spares import Spares

MANIFEST = "0" * 64
TAIL = 1000
CHUNKS = 4


def content(nbytes: int, seed: int = 0) -> bytes:
    """Bytes of which no two chunks are the same."""
    block = bytes(range(256)) * 16
    count = -(-nbytes // len(block))
    return b"".join((seed * 10**6 + i).to_bytes(8, "little") + block[8:] for i in range(count))[
        :nbytes
    ]


def index_of(data: bytes) -> Index:
    pieces = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    return Index(MANIFEST, len(data), tuple(digest(p) for p in pieces))


DATA = content((CHUNKS - 1) * CHUNK_BYTES + TAIL)
INDEX = index_of(DATA)
PIECES = [DATA[slice(*INDEX.span(i))] for i in range(CHUNKS)]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# -- writing ----------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 5000),
            st.integers(-2, 2).map(lambda d: CHUNK_BYTES + d),
            st.just(2 * CHUNK_BYTES + 7),
        ),
        max_size=6,
    ),
)
def test_index_is_that_of_the_bytes_however_they_are_written(sizes: list[int]) -> None:
    data = content(sum(sizes))
    with folder() as at:
        writer = IndexWriter(at / "x")
        start = 0
        for size in sizes:
            writer.write(data[start : start + size])
            start += size
        assert writer.nbytes == len(data)
        assert writer.finish(MANIFEST) == index_of(data)
        assert (at / "x").read_bytes() == data


def test_wider_elements_are_written_as_their_bytes(tmp_path: Path) -> None:
    writer = IndexWriter(tmp_path / "x")
    writer.write(memoryview(bytes(range(16))).cast("I"))
    assert writer.finish(MANIFEST) == index_of(bytes(range(16)))


def test_writer_takes_no_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        IndexWriter(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"precious"


def test_nothing_makes_an_empty_artefact(tmp_path: Path) -> None:
    index = IndexWriter(tmp_path / "x").finish(MANIFEST)
    assert index == Index(MANIFEST, 0, ())
    file = ChunkFile(tmp_path / "y", index)
    assert file.complete
    assert file.missing() == []
    file.finish()
    assert (tmp_path / "y").read_bytes() == b""
    assert list(read_chunks(tmp_path / "y", index)) == []


def test_small_file_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    write_durably(path, b"old", 0o600)
    assert path.stat().st_mode & 0o777 == 0o600

    def fails(self: Path, target: Path) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="power cut"):
        write_durably(path, b"new")
    assert path.read_bytes() == b"old"


# -- receiving --------------------------------------------------------------------------------------


class Receiving(RuleBasedStateMachine):
    """A transfer with every accident that the file may meet.

    ``safe`` is what was made durable, ``written`` what is known to be here, ``held`` what the file holds:
    of a process that died, more than the next one knows of, until it comes to look there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / "payload"
        self.part = self.root / "payload.part"
        self.record = self.root / "payload.have"
        self.written: set[int] = set()
        self.safe: set[int] = set()
        self.held: set[int] = set()
        self.others = 0

    @initialize()
    def begin(self) -> None:
        self.file = ChunkFile(self.path, INDEX)

    @rule(number=st.integers(0, CHUNKS - 1))
    def chunk(self, number: int) -> None:
        self.file.write(number, PIECES[number])
        self.written.add(number)
        self.held.add(number)

    @rule(number=st.integers(0, CHUNKS - 1), at=st.floats(0, 1, exclude_max=True))
    def damaged(self, number: int, at: float) -> None:
        piece = bytearray(PIECES[number])
        piece[int(at * len(piece))] ^= 1
        with pytest.raises(DataCorrupt, match=f"chunk {number}:"):
            self.file.write(number, piece)

    @rule(number=st.integers(0, CHUNKS - 1))
    def of_another_place(self, number: int) -> None:
        with pytest.raises((DataCorrupt, ManifestInvalid)):
            self.file.write(number, PIECES[(number + 1) % CHUNKS])

    @rule(number=st.sampled_from([-1, CHUNKS, 1 << 31]))
    def out_of_range(self, number: int) -> None:
        with pytest.raises(ManifestInvalid, match=f"chunk {number} of {CHUNKS}"):
            self.file.write(number, PIECES[0])

    @rule(
        number=st.integers(0, CHUNKS - 1), size=st.sampled_from([0, 1, TAIL - 1, CHUNK_BYTES + 1])
    )
    def of_another_size(self, number: int, size: int) -> None:
        with pytest.raises(ManifestInvalid, match=f"chunk {number}: {size} bytes"):
            self.file.write(number, bytes(size))

    @rule()
    def sync(self) -> None:
        self.file.save()
        self.safe = set(self.written)

    @rule()
    def reopen(self) -> None:
        self.file.close()
        self.safe = set(self.written)
        self.revive()

    def revive(self) -> None:
        """Open again; what a dead process wrote in ascending order behind its record is found."""
        self.file = ChunkFile(self.path, INDEX)
        self.written = {
            i for i in range(CHUNKS) if not any(a <= i < b for a, b in self.file.missing())
        }
        assert self.safe <= self.written <= self.held
        found = set(self.safe)
        for number in range(CHUNKS):
            if number not in self.held:
                break
            found.add(number)
        assert found <= self.written

    @rule()
    def kill(self) -> None:
        """The process dies: what the disk holds is as it was, the record may lag behind."""
        record = self.record.read_bytes() if self.record.exists() else None
        self.file.close()
        if record is None:
            self.record.unlink(missing_ok=True)
        else:
            self.record.write_bytes(record)
        self.revive()

    @precondition(lambda self: self.written - self.safe)
    @rule()
    def power_cut(self) -> None:
        """As `kill`, and bytes that were never synced are gone."""
        record = self.record.read_bytes() if self.record.exists() else None
        self.file.close()
        if record is None:
            self.record.unlink(missing_ok=True)
        else:
            self.record.write_bytes(record)
        with self.part.open("r+b") as file:
            for number in self.held - self.safe:
                file.seek(INDEX.span(number)[0])
                file.write(bytes(len(PIECES[number])))
        self.written, self.held = set(self.safe), set(self.safe)
        self.file = ChunkFile(self.path, INDEX)

    @rule()
    def discarded_halfway(self) -> None:
        """The file is gone, the record is still there (or was restored)."""
        self.file.close()
        self.part.unlink()
        self.written, self.safe, self.held = set(), set(), set()
        self.file = ChunkFile(self.path, INDEX)

    @rule()
    def another_contribution(self) -> None:
        self.file.close()
        self.others += 1
        theirs = content(INDEX.nbytes, seed=self.others)
        other = index_of(theirs)
        with ChunkFile(self.path, other) as file:
            assert file.missing() == [(0, CHUNKS)]
            for number in range(CHUNKS):
                file.write(number, theirs[slice(*other.span(number))])
        self.written, self.safe, self.held = set(), set(), set()
        self.file = ChunkFile(self.path, INDEX)

    @rule()
    def written_over_a_spare(self) -> None:
        self.file.discard()
        spares = Spares(self.root / "spare", 1)
        (self.root / "old").write_bytes(content(INDEX.nbytes + 5, seed=1000))
        spares.give(self.root / "old")
        self.written, self.safe, self.held = set(), set(), set()
        self.file = ChunkFile(self.path, INDEX, spares)
        assert self.part.stat().st_size == INDEX.nbytes
        assert spares.clear() == 0

    @precondition(lambda self: len(self.written) < CHUNKS)
    @rule()
    def finish_early(self) -> None:
        with pytest.raises(DataCorrupt, match="missing"):
            self.file.finish()

    @precondition(lambda self: len(self.written) == CHUNKS)
    @rule()
    def finish(self) -> None:
        self.file.finish()
        assert self.path.read_bytes() == DATA
        assert not self.record.exists()
        self.path.unlink()
        self.written, self.safe, self.held = set(), set(), set()
        self.begin()

    @invariant()
    def knows_what_is_here(self) -> None:
        if not hasattr(self, "file"):
            return
        here = set(range(CHUNKS))
        for first, end in self.file.missing():
            here -= set(range(first, end))
        # More may be here than was synced, but never something that is not.
        assert self.safe <= here <= self.written
        assert self.file.complete == (len(here) == CHUNKS)
        assert self.file.received_bytes == sum(len(PIECES[i]) for i in here)
        data = self.part.read_bytes()
        assert not self.path.exists()
        assert all(data[slice(*INDEX.span(i))] == PIECES[i] for i in here)

    def teardown(self) -> None:
        if hasattr(self, "file"):
            self.file.close()
        shutil.rmtree(self.root)


Receiving.TestCase.settings = settings(max_examples=15, stateful_step_count=15)
TestReceiving = Receiving.TestCase


@pytest.mark.parametrize("order", [range(CHUNKS), reversed(range(CHUNKS)), [2, 0, 2, 3, 1, 0]])
def test_any_order_and_duplicates(order: list[int], tmp_path: Path) -> None:
    file = ChunkFile(tmp_path / "x", INDEX)
    for number in order:
        file.write(number, PIECES[number])
    file.finish()
    assert (tmp_path / "x").read_bytes() == DATA
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_an_old_record_never_vouches_for_a_new_file(tmp_path: Path) -> None:
    path, part, record = tmp_path / "x", tmp_path / "x.part", tmp_path / "x.have"
    with ChunkFile(path, INDEX) as file:
        for number, piece in enumerate(PIECES):
            file.write(number, piece)
    assert record.exists()
    part.unlink()
    file = ChunkFile(path, INDEX)
    assert not record.exists()
    assert file.missing() == [(0, CHUNKS)]
    part.write_bytes(bytes(INDEX.nbytes))  # killed here; the file was made, nothing was written
    with ChunkFile(path, INDEX) as file:
        assert file.missing() == [(0, CHUNKS)]


def test_the_name_comes_with_the_last_chunk(tmp_path: Path) -> None:
    file = ChunkFile(tmp_path / "x", INDEX)
    for number, piece in enumerate(PIECES):
        assert not (tmp_path / "x").exists()
        file.write(number, piece)
    with pytest.raises(DataCorrupt, match="are missing"):
        ChunkFile(tmp_path / "y", INDEX).finish()
    file.finish()
    assert (tmp_path / "x").read_bytes() == DATA


def test_discarding_forgets_the_record_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ChunkFile(tmp_path / "x", INDEX)
    file.write(0, PIECES[0])
    gone = []
    real = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        gone.append(self.name)
        real(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    file.discard()
    assert gone == ["x.have", "x.part"]
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_durable_before_the_record_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ChunkFile(tmp_path / "x", INDEX)
    file.write(0, PIECES[0])
    done = []
    sync, write = os.fdatasync, chunks_module.write_durably

    def synced(fd: int) -> None:
        done.append("bytes")
        sync(fd)

    def written(path: Path, data: bytes, mode: int = 0o644) -> None:
        done.append("record")
        write(path, data, mode)

    monkeypatch.setattr(os, "fdatasync", synced)
    monkeypatch.setattr(chunks_module, "write_durably", written)
    file.save()
    file.write(1, PIECES[1])
    file.close()
    assert done == ["bytes", "record"] * 2


def test_record_is_damaged(tmp_path: Path) -> None:
    with ChunkFile(tmp_path / "x", INDEX) as file:
        file.write(0, PIECES[0])
    record = tmp_path / "x.have"
    whole = record.read_bytes()
    for data in (b"", whole[:-1], whole + b"\1", b"\1" * 68):
        record.write_bytes(data)
        with ChunkFile(tmp_path / "x", INDEX) as file:
            assert file.missing() == [(1, CHUNKS)]  # what is there is known by its digest


def test_a_long_transfer_is_made_durable_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protos.chunks.SAVE_CHUNKS", 2)
    record = tmp_path / "x.have"
    file = ChunkFile(tmp_path / "x", INDEX)
    known = []
    for number in range(3):
        file.write(number, PIECES[number])
        known.append(sum(record.read_bytes()[64:]) if record.exists() else 0)
    file.close()
    assert known == [0, 2, 2]


@pytest.mark.parametrize("damaged", range(CHUNKS))
def test_a_complete_file_that_was_damaged_lacks_one_chunk(damaged: int, tmp_path: Path) -> None:
    data = bytearray(DATA)
    data[INDEX.span(damaged)[0]] ^= 1
    (tmp_path / "x").write_bytes(data)
    with ChunkFile(tmp_path / "x", INDEX, verify=True) as file:
        assert not (tmp_path / "x").exists()  # what is not whole has not the name
        assert file.missing() == [(damaged, damaged + 1)]
        file.write(damaged, PIECES[damaged])
        file.finish()
    assert (tmp_path / "x").read_bytes() == DATA


# -- sending ----------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(DATA)
    assert list(read_chunks(path, INDEX)) == list(enumerate(PIECES))
    assert list(read_chunks(path, INDEX, [(3, 4), (0, 1), (1, 1)])) == [
        (3, PIECES[3]),
        (0, PIECES[0]),
    ]


@pytest.mark.parametrize("wrong", [(0, 5), (-1, 1), (2, 1), (4, 5)])
def test_ranges_out_of_bounds_are_refused(wrong: tuple[int, int], tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    with pytest.raises(ManifestInvalid, match="of 4"):
        list(read_chunks(tmp_path / "x", INDEX, [wrong]))


def test_a_file_that_is_too_short_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA[: CHUNK_BYTES + 5])
    with pytest.raises(ManifestInvalid, match="ends before chunk 1"):
        list(read_chunks(tmp_path / "x", INDEX))


@given(st.sets(st.integers(0, 60)))
def test_ranges_say_the_same_numbers_in_fewest_pieces(numbers: set[int]) -> None:
    found = ranges(sorted(numbers))
    assert {n for first, end in found for n in range(first, end)} == numbers
    assert all(first < end for first, end in found)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(found))
