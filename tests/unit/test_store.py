"""The store: names appear with complete bytes behind them, damage and erasure are told apart.

Each test runs on a folder and on a bucket of a real S3-compatible server.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import obstore
import pytest

from orchestrator.config import DaemonConfig
from orchestrator.store import Store, open_store
from protos.digest import digest
from protos.errors import DataCorrupt, InvalidInput, NotFound, OutOfSpace
from protos.manifest import CHUNK_BYTES, Index, Manifest, TensorSpec
from tests.support.object_store import ObjectStore

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = Manifest((TensorSpec("weight", (3, 2), "float32"),))
NOWHERE = "0" * 64


class Place(Protocol):
    """Where a store is, seen past the store."""

    def open(self) -> Store: ...

    def write(self, key: str, data: bytes) -> None: ...


class InFolder:
    def __init__(self, root: Path) -> None:
        self.root = root

    def open(self) -> Store:
        return Store(self.root)

    def write(self, key: str, data: bytes) -> None:
        (self.root / key).write_bytes(data)


class InBucket:
    def __init__(self, root: Path, server: ObjectStore) -> None:
        self.root, prefix = root, f"{root.parent.name}/models"
        self.raw = server.raw(prefix)
        self.config = DaemonConfig.model_validate({"store": server.section(prefix)})

    def open(self) -> Store:
        return open_store(self.config, self.root, "federation")

    def write(self, key: str, data: bytes) -> None:
        obstore.put(self.raw, key, data)


@pytest.fixture(params=["folder", pytest.param("bucket", marks=pytest.mark.xdist_group("s3"))])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return InFolder(tmp_path / "store")
    return InBucket(tmp_path / "store", request.getfixturevalue("object_store"))


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


def data_key(digest: str) -> str:
    return f"artefacts/{digest[:2]}/{digest}.data"


def put(store: Store, data: bytes | bytearray) -> Index:
    path = store.scratch("model")
    path.write_bytes(data)
    return store.put_file(path, MANIFEST.digest)


def test_artefacts_come_back(store: Store) -> None:
    data = os.urandom(2 * CHUNK_BYTES + 7)
    index = put(store, data)
    assert [digest(data[a:b]) for a, b in map(index.span, range(3))] == list(index.chunks)
    assert index.digest in store
    assert store.index(index.digest) == index
    assert store.path(index.digest).read_bytes() == data
    assert (
        store.read_range(index.digest, CHUNK_BYTES - 1, CHUNK_BYTES + 3)
        == (data[CHUNK_BYTES - 1 : CHUNK_BYTES + 3])
    )
    assert store.read_range(index.digest, 5, 5) == b""
    store.verify(index.digest)


def test_what_is_on_this_machine_is_told_without_fetching(store: Store) -> None:
    index = put(store, b"bytes")
    here = store.here(index.digest)
    assert here is not None
    assert here.read_bytes() == b"bytes"
    assert store.here("ab" * 32) is None
    if store.blobs.spare():  # of a bucket: only a copy was here
        assert store.here(index.digest) is None
        assert index.digest in store


def test_an_empty_artefact_is_one_too(store: Store) -> None:
    index = put(store, b"")
    assert index.chunks == ()
    store.verify(index.digest)
    assert store.read_range(index.digest, 0, 0) == b""


def test_adopting_moves_and_can_be_repeated(store: Store) -> None:
    index = put(store, b"bytes")
    again = store.scratch("again")
    again.write_bytes(b"bytes")
    assert store.adopt(index, again) == index.digest
    assert not again.exists()
    assert store.adopt(index, store.path(index.digest)) == index.digest
    assert store.path(index.digest).read_bytes() == b"bytes"
    assert list((store.root / "scratch").iterdir()) == []


def test_a_file_of_another_size_is_not_adopted(store: Store) -> None:
    path = store.scratch("short")
    path.write_bytes(b"abc")
    index = Index(MANIFEST.digest, 4, (digest(b"abcd"),))
    with pytest.raises(DataCorrupt, match=r"3 bytes where .* says 4"):
        store.adopt(index, path)
    assert index.digest not in store
    assert path.exists()


def test_another_process_reads_the_same_store(place: Place, store: Store) -> None:
    index = put(store, b"bytes")
    path = store.scratch("under way")
    path.touch()
    assert place.open().read_range(index.digest, 1, 3) == b"yt"
    assert path.exists(), "opening a store to read it must not clean it"


def test_manifests_and_documents(store: Store) -> None:
    assert store.put_manifest(MANIFEST) == store.put_manifest(MANIFEST) == MANIFEST.digest
    assert store.manifest(MANIFEST.digest) == MANIFEST
    name = store.put_bytes(b"{}")
    assert name == digest(b"{}") == store.put_bytes(memoryview(b"{}"))
    assert store.get_bytes(name) == b"{}"


@pytest.mark.parametrize("name", [NOWHERE, "../../etc/passwd", "", "A" * 64, "0" * 63])
def test_what_is_not_there_is_not_found(store: Store, name: str) -> None:
    for read in (store.index, store.path, store.manifest, store.get_bytes, store.verify):
        with pytest.raises(NotFound):
            read(name)
    with pytest.raises(NotFound):
        store.read_range(name, 0, 1)
    with pytest.raises(NotFound):
        store.erase(name, "why not")
    assert name not in store
    assert store.erased(name) is None


def test_ranges_outside_are_refused(store: Store) -> None:
    index = put(store, b"bytes")
    for start, stop in ((-1, 2), (0, 6), (3, 2), (6, 6)):
        with pytest.raises(InvalidInput):
            store.read_range(index.digest, start, stop)


def test_damage_names_the_chunk(place: Place, store: Store) -> None:
    data = bytearray(os.urandom(3 * CHUNK_BYTES))
    index = put(store, data)
    data[CHUNK_BYTES + 5] ^= 1
    place.write(data_key(index.digest), bytes(data))
    with pytest.raises(DataCorrupt, match="chunk 1") as caught:
        store.verify(index.digest)
    assert caught.value.facts == {"artefact": index.digest, "chunk": 1}

    place.write(data_key(index.digest), bytes(data[: 2 * CHUNK_BYTES + 1]))
    with pytest.raises(DataCorrupt, match="chunk 2"):
        store.read_range(index.digest, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES)

    name = store.put_bytes(b"document")
    place.write(f"objects/{name}", b"Document")
    with pytest.raises(DataCorrupt, match="do not have the digest"):
        store.get_bytes(name)


def test_erased_is_not_corrupt(store: Store) -> None:
    index, name = put(store, b"bytes"), store.put_bytes(b"document")
    for one in (index.digest, name):
        store.erase(one, "site east asked for it")
        store.erase(one, "again")
        assert store.erased(one) == "site east asked for it"
    assert index.digest not in store
    for read in (store.index, store.path, store.verify):
        with pytest.raises(NotFound, match="was erased: site east asked for it") as caught:
            read(index.digest)
        assert caught.value.facts["erased"] is True
    with pytest.raises(NotFound, match="was erased"):
        store.read_range(index.digest, 0, 1)
    with pytest.raises(NotFound, match="was erased"):
        store.get_bytes(name)
    assert list(store.blobs.list("artefacts")) == []


def test_what_was_erased_may_come_back(store: Store) -> None:
    index = put(store, b"bytes")
    store.erase(index.digest, "by mistake")
    assert put(store, b"bytes") == index
    assert store.erased(index.digest) is None
    store.verify(index.digest)


def test_scratch_names_differ_and_are_cleaned(store: Store) -> None:
    paths = {store.scratch("run/1/../x") for _ in range(10)}
    assert len(paths) == 10
    assert {path.parent for path in paths} == {store.root / "scratch"}
    for path in paths:
        path.write_bytes(b"x" * 10)
    folder = store.scratch("folder")
    folder.mkdir()
    (folder / "file").write_bytes(b"y" * 5)
    index = put(store, b"bytes")
    freed = store.clean()
    assert freed - 105 in (0, 5), "what a bucket has on this machine may go, too"
    assert list((store.root / "scratch").iterdir()) == []
    store.verify(index.digest)


def test_a_half_written_document_is_cleaned(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    (store.root / "objects" / ".half.1.new").write_bytes(b"z")
    assert store.clean() == 1


def test_a_cut_off_erasure_is_finished(place: Place, store: Store) -> None:
    index = put(store, b"bytes")
    store.erase(index.digest, "why")
    place.write(data_key(index.digest), b"bytes")
    assert index.digest not in store
    assert store.clean() == 5
    assert list(store.blobs.list("artefacts")) == []


def test_room_is_set_aside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(store.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with store.reserve(600) as room:
        with pytest.raises(OutOfSpace) as caught, store.reserve(500):
            pass
        facts = caught.value.facts
        assert (facts["needed"], facts["free"], facts["reserved"]) == (500, 1000, 600)
        room.spend(200)
        with store.reserve(500):
            pass
    with store.reserve(1000):
        pass


def test_a_full_disk_is_our_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    store = Store(tmp_path / "store")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpace, match="disk is full"):
        store.put_bytes(b"document")


def test_data_without_an_index_is_collected(place: Place, store: Store) -> None:
    store.blobs.put(data_key(NOWHERE), b"orphan")
    assert NOWHERE not in store
    assert store.collect(set(), dry_run=False).files == 0, "its index may be on the way"
    assert store.collect(set(), dry_run=False, grace_s=-60).files == 1
    assert list(store.blobs.list("artefacts")) == []


def test_collect_removes_what_nobody_needs(store: Store) -> None:
    store.put_manifest(MANIFEST)
    lonely = store.put_manifest(Manifest((TensorSpec("other", (1,), "float32"),)))
    kept, gone = put(store, b"kept"), put(store, b"gone!")
    document, waste = store.put_bytes(b"document"), store.put_bytes(b"waste")
    keep = {kept.digest, document}

    young = store.collect(keep, dry_run=False)
    assert (young.files, young.kept) == (0, 6), "what is young may not be in the ledger yet"

    dry = store.collect(keep, dry_run=True, grace_s=-60)
    assert set(dry.names) == {gone.digest, waste, lonely}
    assert gone.digest in store

    done = store.collect(keep, dry_run=False, grace_s=-60)
    assert done == dry.model_copy(update={"dry_run": False})
    assert (done.files, done.kept) == (4, 3)  # index and data of one artefact; three names stay
    assert kept.digest in store
    assert store.manifest(MANIFEST.digest) == MANIFEST, "the manifest of a kept artefact is kept"
    assert store.get_bytes(document) == b"document"
    with pytest.raises(NotFound, match="was erased: collected"):
        store.path(gone.digest)
    assert store.collect(keep, dry_run=False, grace_s=-60).files == 0


def test_what_is_retired_is_gone_and_may_come_back(store: Store) -> None:
    kept, gone = put(store, b"kept"), [put(store, os.urandom(CHUNK_BYTES + n)) for n in range(3)]
    names = [index.digest for index in gone]
    store.retire(names, before=time.time() - 60)
    assert all(name in store for name in names), "somebody may have stored them just now"
    store.retire([*names, NOWHERE], before=time.time() + 60)
    store.retire(names, before=time.time() + 60)
    assert not any(name in store for name in names)
    with pytest.raises(NotFound):
        store.index(names[0])
    store.verify(kept.digest)
    data = os.urandom(CHUNK_BYTES)
    store.verify(put(store, data).digest)
    assert {blob.digest for blob in store.blobs.list("artefacts")} == {
        kept.digest,
        Index(MANIFEST.digest, len(data), (digest(data),)).digest,
    }


def test_a_retired_file_in_a_folder_is_written_over(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    index = put(store, os.urandom(CHUNK_BYTES))
    inode = store.path(index.digest).stat().st_ino
    store.retire([index.digest], before=time.time() + 60)
    path = tmp_path / "next"
    assert store.spares.take(path, CHUNK_BYTES)
    assert path.stat().st_ino == inode


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.store import Store
import protos.chunks
store, at, steps = Store(Path(sys.argv[1])), int(sys.argv[2]), 0

def step(real):
    def call(*args, **kwargs):
        global steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call

os.fsync, os.unlink, Path.rename, Path.replace = (
    step(f) for f in (os.fsync, os.unlink, Path.rename, Path.replace)
)
path = store.scratch("model")
path.write_bytes(b"bytes" * 1000)
index = store.put_file(path, "0" * 64)
print(index.digest, flush=True)
"""


def test_killed_at_any_step_a_name_has_its_bytes_or_is_not_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    data = b"bytes" * 1000
    expected = Index("0" * 64, len(data), (digest(data),)).digest
    for at in range(1, 20):
        shutil.rmtree(store.root)
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(store.root), str(at)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        after = Store(store.root)
        if expected in after:
            after.verify(expected)
        after.clean()
        assert list((after.root / "scratch").iterdir()) == []
        if done.returncode == 0:
            assert done.stdout.strip() == expected
            assert expected in after
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        put_again = after.scratch("again")
        put_again.write_bytes(data)
        assert after.put_file(put_again, "0" * 64).digest == expected
        after.verify(expected)
    else:
        pytest.fail("it never got to its end")
    assert at > 5
