"""Which models go out with the plans, and with what."""

from pathlib import Path

import pytest

from orchestrator.small import SMALL_BYTES, small_model
from orchestrator.store import Store
from protos.manifest import Index, Manifest, TensorSpec


def put(store: Store, folder: Path, elements: int) -> str:
    manifest = Manifest((TensorSpec("w", (elements,), "float32", "parameter"),))
    store.put_manifest(manifest)
    file = folder / "model"
    file.write_bytes(bytes(range(256)) * (manifest.nbytes // 256 + 1))
    with file.open("r+b") as data:
        data.truncate(manifest.nbytes)
    return store.put_file(file, manifest.digest).digest


@pytest.mark.parametrize("nbytes", [4, 40_000, SMALL_BYTES])
def test_a_small_model_is_whole_with_what_proves_it(tmp_path: Path, nbytes: int) -> None:
    store = Store(tmp_path / "store")
    digest = put(store, tmp_path, nbytes // 4)
    model = small_model(store, digest)
    assert model is not None
    index, manifest = Index.decode(model.head.index), Manifest.decode(model.head.manifest)
    assert (index.digest, index.manifest) == (digest, manifest.digest)
    assert model.data == store.path(digest).read_bytes()


def test_a_larger_one_is_fetched(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert small_model(store, put(store, tmp_path, SMALL_BYTES // 4 + 1)) is None


def test_one_whose_manifest_is_larger_is_fetched_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    specs = tuple(TensorSpec(f"w{i:04d}", (1,), "float32", "parameter") for i in range(1000))
    manifest = Manifest(specs)
    store.put_manifest(manifest)
    file = tmp_path / "model"
    file.write_bytes(bytes(manifest.nbytes))
    assert small_model(store, store.put_file(file, manifest.digest).digest) is None
