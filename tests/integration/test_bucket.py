"""A store in a bucket: a real S3-compatible server, lines that break, readers that have only a URL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch

from orchestrator.arithmetic.places import WINDOW_BYTES, open_place
from orchestrator.arithmetic.planning import payload_loader
from orchestrator.config import DaemonConfig, parse_daemon
from orchestrator.doctor import examine
from orchestrator.home import Home
from orchestrator.rounds.reduce import reduce
from orchestrator.store import Store, open_store
from orchestrator.store.bucket import Bucket
from orchestrator.toml_text import document
from protos.digest import digest
from protos.errors import ConfigInvalid, Conflict, DataCorrupt, NotFound, Unavailable
from protos.manifest import CHUNK_BYTES, Index, Manifest
from tests.support.object_store import ObjectStore
from tests.support.proxy import Proxy
from tests.support.workbench import Workbench, of_spec

pytestmark = pytest.mark.xdist_group("s3")

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = "0" * 64
FOLDERS = ("artefacts", "manifests", "objects", "tombstones")


class Door:
    """A prefix of a server, reached through a line that can be cut."""

    def __init__(self, root: Path, server: ObjectStore, line: Proxy) -> None:
        self.root, self.server, self.line, self.prefix = root, server, line, root.name

    def config(self, **more: Any) -> DaemonConfig:
        section = self.server.section(self.prefix, self.line.address, **more)
        return DaemonConfig.model_validate({"store": section})

    def store(self, **more: Any) -> Store:
        return open_store(self.config(**more), self.root / "store", "federation")

    def direct(self) -> Store:
        """As the daemon of a cluster opens it."""
        return Store(self.root / "store", self.bucket(direct=True))

    def bucket(self, *, direct: bool, **more: Any) -> Bucket:
        return Bucket(self.config(**more).store, self.root / "store", direct=direct)

    def keys(self) -> set[str]:
        pages = obstore.list(self.server.raw(self.prefix))
        return {meta["path"] for page in pages for meta in page}


@pytest.fixture
def door(tmp_path: Path, object_store: ObjectStore) -> Iterator[Door]:
    with Proxy(object_store.address) as line:
        yield Door(tmp_path, object_store, line)


def put(store: Store, data: bytes) -> Index:
    path = store.scratch("model")
    path.write_bytes(data)
    return store.put_file(path, MANIFEST)


# -- what goes wrong -----------------------------------------------------------------------------------

UPLOAD = """
import sys
from pathlib import Path
from orchestrator.config import parse_daemon
from orchestrator.store import open_store
root = Path(sys.argv[1])
store = open_store(parse_daemon((root / "farflung.toml").read_text()), root / "store", "federation")
print("open", flush=True)
store.put_file(root / "model", "0" * 64)
"""


def test_killed_in_the_middle_of_an_upload_there_is_no_name(door: Door, tmp_path: Path) -> None:
    data = os.urandom(40 << 20)
    (tmp_path / "model").write_bytes(data)
    section = door.server.section(door.prefix, door.line.address)
    (tmp_path / "farflung.toml").write_text(document({"store": section}))
    child = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "open\n"
        door.line.up.await_bytes(12 << 20, 60)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL, "the upload was over before it was killed"
    assert door.keys() == {"farflung"}

    store = door.store()
    store.clean()
    chunks = tuple(digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES))
    index = Index(MANIFEST, len(data), chunks)
    assert index.digest not in store
    assert store.adopt(index, tmp_path / "model") == index.digest
    store.verify(index.digest)


def test_out_of_reach_is_unavailable_and_goes_on_when_it_is_back(
    door: Door, tmp_path: Path
) -> None:
    store = door.store()
    index = put(store, b"bytes")
    new = tmp_path / "new"
    new.write_bytes(b"other")
    other = Index(MANIFEST, 5, (digest(b"other"),))
    target, door.line.target = door.line.target, "127.0.0.1:9"  # nobody is there
    door.line.cut()
    for call in (
        lambda: store.index(index.digest),
        lambda: store.read_range(index.digest, 0, 5),
        lambda: store.adopt(other, new),
    ):
        with pytest.raises(Unavailable, match="goes on when it does"):
            call()
    assert new.read_bytes() == b"other", "what could not be stored stays where it landed"
    door.line.target = target
    assert store.adopt(other, new) == other.digest
    store.verify(index.digest)
    store.verify(other.digest)


def test_what_is_set_wrong_is_said(door: Door, tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match=r"there is no such bucket.*\[store\] url"):
        door.store(url="s3://elsewhere/models")
    with pytest.raises(ConfigInvalid, match="access to farflung was denied") as denied:
        door.store(credentials=str(door.server.readers))
    assert "secret" not in denied.value.message
    with pytest.raises(ConfigInvalid, match="can't be read"):
        door.store(credentials=str(tmp_path / "missing"))
    with pytest.raises(ConfigInvalid, match="must be https"):
        parse_daemon('[store]\nurl = "s3://b/p"\nendpoint = "http://storage.example"')
    door.store()
    with pytest.raises(Conflict, match=r"belongs to another federation \(federation\)"):
        open_store(door.config(), tmp_path / "two", "another")


def test_doctor_looks_at_the_bucket(door: Door, tmp_path: Path) -> None:
    home = Home.create(tmp_path / "home", "127.0.0.1:0")

    def found(**more: Any) -> list[tuple[str, str]]:
        section = door.server.section(door.prefix, door.line.address, **more)
        home.config_file.write_text(document({"store": section}))
        findings = [f for f in examine(home.path) if f.about in ("store", "permissions")]
        return [(f.state, f.message) for f in findings]

    ((state, message),) = found()
    assert state == "ok"
    assert message.startswith(f"s3://bucket/{door.prefix} answers; nothing is in it yet")
    assert door.keys() == set(), "doctor changes nothing"
    open_store(Home(home.path).config, home.store, home.federation)
    assert found() == [("ok", f"s3://bucket/{door.prefix} answers")]
    ((state, message),) = found(url="s3://elsewhere/models")
    assert state == "failed"
    assert "no such bucket" in message
    door.server.credentials.chmod(0o644)
    try:
        assert [state for state, _ in found()] == ["failed", "ok"]
    finally:
        door.server.credentials.chmod(0o600)


def test_a_folder_that_was_copied_up_is_the_same_store(door: Door, tmp_path: Path) -> None:
    old = Store(tmp_path / "old")
    kept, gone = put(old, b"bytes").digest, put(old, b"gone").digest
    document = old.put_bytes(b"{}")
    old.erase(gone, "site east asked for it")
    for blob in [b for name in FOLDERS for b in old.blobs.list(name)]:
        obstore.put(door.server.raw(door.prefix), blob.key, old.blobs.get(blob.key))
    store = door.store()
    store.verify(kept)
    assert store.get_bytes(document) == b"{}"
    assert store.erased(gone) == "site east asked for it"


# -- whole files -----------------------------------------------------------------------------------------


def test_many_who_want_the_same_model_read_it_once(door: Door) -> None:
    data = os.urandom(6 * CHUNK_BYTES + 5)
    name = put(door.store(), data).digest
    store = door.store()
    store.clean()  # as a daemon that starts: nothing is here
    before = door.line.down.nbytes
    start = threading.Barrier(8)

    def fetch(_: int) -> bytes:
        start.wait()
        return store.path(name).read_bytes()

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetch, range(8))) == {data}
    assert door.line.down.nbytes - before < 1.1 * len(data)


def test_the_cache_is_bounded_and_what_was_lent_stays(door: Door, tmp_path: Path) -> None:
    store = door.store(cache_bytes=3000)
    models = [os.urandom(1000) for _ in range(6)]
    names = [put(store, data).digest for data in models]
    (tmp_path / "work").mkdir()
    lent = store.lend(names[0], tmp_path / "work")
    for name, data in zip(names, models, strict=True):
        assert store.path(name).read_bytes() == data
    assert len(list((tmp_path / "store" / "cache").iterdir())) == 3
    assert lent.read_bytes() == models[0]
    store.erase(names[5], "site east asked for it")
    assert models[5] not in [file.read_bytes() for file in (tmp_path / "store").rglob("*.data")]


def test_a_damaged_object_is_not_taken(door: Door) -> None:
    data = bytearray(os.urandom(3 * CHUNK_BYTES))
    store = door.store()
    name = put(store, bytes(data)).digest
    store.clean()
    data[2 * CHUNK_BYTES] ^= 1
    key = f"artefacts/{name[:2]}/{name}.data"
    obstore.put(door.server.raw(door.prefix), key, bytes(data))
    with pytest.raises(DataCorrupt, match="chunk 2"):
        store.path(name)
    obstore.put(door.server.raw(door.prefix), key, bytes(data[:CHUNK_BYTES]))
    with pytest.raises(DataCorrupt, match="chunk 1"):
        store.path(name)


# -- ranges ------------------------------------------------------------------------------------------------


def first_bytes(url: str) -> bytearray:
    out = bytearray(10)
    with closing(open_place(url)) as reader:
        reader.read_into(memoryview(out), 0, 10)
    return out


def test_ranges_are_read_with_a_url_alone(door: Door, tmp_path: Path) -> None:
    data = os.urandom(2 * WINDOW_BYTES + 1000)
    store = door.direct()
    name = put(store, data).digest
    url = store.place(name, tmp_path)
    assert "secret" not in url
    spans = [(0, 10), (WINDOW_BYTES - 5, WINDOW_BYTES + 5), (7, len(data)), (3, 3), (100, 200)]
    reader = open_place(url)
    for start, stop in spans:
        out = bytearray(stop - start)
        reader.read_into(memoryview(out), start, stop)
        assert out == data[start:stop]
    door.line.cut()  # the next read opens another connection
    out = bytearray(50)
    reader.read_into(memoryview(out), WINDOW_BYTES * 2, WINDOW_BYTES * 2 + 50)
    assert out == data[WINDOW_BYTES * 2 : WINDOW_BYTES * 2 + 50]
    with pytest.raises(DataCorrupt, match="it ends before byte"):
        reader.read_into(memoryview(bytearray(10)), len(data), len(data) + 10)
    reader.close()

    plain = url.split("?")[0]
    with pytest.raises(Unavailable, match="status 403") as refused:
        first_bytes(f"{plain}?X-Amz-Signature=0")
    assert "X-Amz" not in refused.value.message
    store.erase(name, "why")
    with pytest.raises(NotFound, match="is gone"):
        first_bytes(url)


def test_all_that_a_site_sent_is_read_through_one_connection(door: Door, tmp_path: Path) -> None:
    store = door.direct()
    sums = torch.arange(40, dtype=torch.float64)
    url = store.place(put(store, sums.numpy().tobytes()).digest, tmp_path)
    before = len(door.line.connections)
    with payload_loader() as load:
        for first in range(0, 40, 4):
            part = {"path": url, "offset": 8 * first, "nbytes": 32, "dtype": "float64"}
            assert load({**part, "shape": [2, 2]}).flatten().equal(sums[first : first + 4])
    assert len(door.line.connections) == before + 1


def test_a_reduction_of_urls_has_the_bits_of_one_of_files(door: Door, tmp_path: Path) -> None:
    manifest = Manifest((of_spec("a", (700, 1000)), of_spec("b", (3,)), of_spec("n", (), "int64")))
    generator = torch.Generator().manual_seed(3)

    def drawn() -> dict[str, torch.Tensor]:
        values = {t.name: torch.randn(t.shape, generator=generator) for t in manifest if t.shape}
        return {**values, "n": torch.tensor(5)}

    base, updates = drawn(), {site: drawn() for site in ("north", "south", "east")}

    def candidate(bench: Workbench) -> str:
        model = bench.put_model(manifest, base)
        rows = [bench.contribution(site, manifest, u) for site, u in updates.items()]
        return reduce(bench.engine, bench.planned(model), bench.closed(rows)).model.shared

    results = {}
    for kind in ("folder", "files", "urls"):
        (root := tmp_path / kind).mkdir()
        bench = Workbench(root)
        if kind != "folder":
            bench.engine.store = bench.store = Store(
                root / "store", door.bucket(direct=kind == "urls")
            )
        before = door.line.down.nbytes
        results[kind] = candidate(bench)
        bench.close()
        if kind == "urls":
            assert door.line.down.nbytes - before > 4 * manifest.nbytes, "read from the bucket"
    assert set(results.values()) == {results["folder"]}
