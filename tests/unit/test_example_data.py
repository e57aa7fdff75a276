"""The example pictures: IDX files, Fashion-MNIST, digits."""

from __future__ import annotations

import gzip
import hashlib
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
sys.path.append(str(EXAMPLES))

from example_data import pictures, split  # noqa: E402
from example_data.idx import IdxError, read_idx  # noqa: E402

IMAGES = np.arange(6 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(6, 28, 28)
LABELS = np.array([0, 1, 2, 9, 1, 0], dtype=np.uint8)

needs_fashion_mnist = pytest.mark.skipif(
    not pictures.fashion_mnist_installed(),
    reason=f"Fashion-MNIST is not installed (Debian package {pictures.FASHION_MNIST_PACKAGE})",
)


def idx_bytes(values: np.ndarray, *, magic: bytes | None = None, dims=None) -> bytes:
    magic = magic or bytes([0, 0, 8, values.ndim])
    return magic + np.array(dims or values.shape, ">u4").tobytes() + values.tobytes()


def packed(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content))
    return path


# ------------------------------------------------------------------------------------------- IDX


def test_idx_reads_what_was_written(tmp_path):
    content = idx_bytes(IMAGES)
    path = packed(tmp_path / "a.gz", content)
    for digest in (None, hashlib.sha256(content).hexdigest()):
        read = read_idx(path, (None, 28, 28), sha256=digest)
        assert read.dtype == np.uint8
        assert np.array_equal(read, IMAGES)


@pytest.mark.parametrize(
    ("content", "shape", "says"),
    [
        pytest.param(idx_bytes(LABELS), (None, 28, 28), "exchanged", id="labels for images"),
        pytest.param(
            idx_bytes(IMAGES, magic=b"\0\0\x0d\3"),
            (None, 28, 28),
            "begins with 00000d03",
            id="floats",
        ),
        pytest.param(
            idx_bytes(IMAGES, magic=b"\1\0\x08\3"),
            (None, 28, 28),
            "begins with 01000803",
            id="magic",
        ),
        pytest.param(idx_bytes(IMAGES), (None, 32, 32), r"\(6, 28, 28\)", id="picture size"),
        pytest.param(idx_bytes(IMAGES), (60_000, 28, 28), "60000", id="number of pictures"),
        pytest.param(idx_bytes(IMAGES[:0]), (None, 28, 28), "holds nothing", id="no pictures"),
        pytest.param(idx_bytes(IMAGES) + b"x", (None, 28, 28), "more bytes", id="trailing byte"),
        pytest.param(idx_bytes(IMAGES)[:-1], (None, 28, 28), "cut short", id="a byte missing"),
        pytest.param(idx_bytes(IMAGES)[:9], (None, 28, 28), "cut short", id="half a header"),
        pytest.param(b"", (None, 28, 28), "cut short", id="empty"),
    ],
)
def test_idx_refuses_what_is_malformed(tmp_path, content, shape, says):
    path = packed(tmp_path / "bad.gz", content)
    with pytest.raises(IdxError, match=says) as error:
        read_idx(path, shape)
    assert str(path) in str(error.value)


def test_idx_refuses_another_file_and_says_what_to_do(tmp_path):
    path = packed(tmp_path / "a.gz", idx_bytes(IMAGES))
    with pytest.raises(IdxError, match="verify = false"):
        read_idx(path, (None, 28, 28), sha256="0" * 64)


def test_idx_sets_no_memory_aside_for_an_absurd_header(tmp_path):
    path = packed(tmp_path / "huge.gz", idx_bytes(IMAGES, dims=(2**32 - 1, 28, 28)))
    tracemalloc.start()
    try:
        with pytest.raises(IdxError, match="over the bound"):
            read_idx(path, (None, 28, 28))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_idx_does_not_unpack_more_than_the_header_announces(tmp_path):
    path = packed(tmp_path / "bomb.gz", idx_bytes(IMAGES) + bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(IdxError, match="more bytes"):
            read_idx(path, (None, 28, 28))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --------------------------------------------------------------------------------- Fashion-MNIST


@pytest.fixture
def folder(tmp_path):
    for stem in ("train", "t10k"):
        packed(tmp_path / f"{stem}-images-idx3-ubyte.gz", idx_bytes(IMAGES))
        packed(tmp_path / f"{stem}-labels-idx1-ubyte.gz", idx_bytes(LABELS))
    return tmp_path


def test_a_folder_of_ones_own_needs_verify_off(folder):
    own = pictures.fashion_mnist("test", folder, verify=False)
    assert np.array_equal(own.pixels, IMAGES)
    assert np.array_equal(own.labels, LABELS)
    assert own.labels.dtype == np.int64
    with pytest.raises(IdxError, match="60000"):
        pictures.fashion_mnist("train", folder)


def test_missing_files_name_the_package_and_the_setting(folder):
    assert pictures.fashion_mnist_installed(folder)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    assert not pictures.fashion_mnist_installed(folder)
    with pytest.raises(pictures.ImagesMissingError) as error:
        pictures.fashion_mnist("test", folder, verify=False)
    for words in ("apt-get install dataset-fashion-mnist", "`root`", "t10k-labels", str(folder)):
        assert words in str(error.value)
    assert "t10k-images" not in str(error.value)


@pytest.mark.parametrize(
    ("labels", "says"), [(LABELS[:5], r"\(5,\)"), (LABELS + 1, "label 10")], ids=["few", "range"]
)
def test_labels_must_fit_the_images(folder, labels, says):
    packed(folder / "train-labels-idx1-ubyte.gz", idx_bytes(labels))
    with pytest.raises(IdxError, match=says):
        pictures.fashion_mnist("train", folder, verify=False)


@needs_fashion_mnist
def test_the_real_files_are_the_published_ones():
    train, test = pictures.fashion_mnist("train"), pictures.fashion_mnist("test")
    assert train.pixels.shape == (60_000, 28, 28)
    assert test.pixels.shape == (10_000, 28, 28)
    assert np.array_equal(np.bincount(train.labels), [6000] * 10)
    assert np.array_equal(np.bincount(test.labels), [1000] * 10)
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert train.pixels.max() == train.top == 255
    assert train.pixels.mean() / 255 == pytest.approx(0.2860, abs=1e-4)


@needs_fashion_mnist
def test_a_changed_pixel_of_the_real_files_is_noticed(tmp_path):
    name = "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress((pictures.FASHION_MNIST_FOLDER / name).read_bytes()))
    content[-1] ^= 1
    packed(tmp_path / name, bytes(content))
    images = "t10k-images-idx3-ubyte.gz"
    (tmp_path / images).symlink_to(pictures.FASHION_MNIST_FOLDER / images)
    with pytest.raises(IdxError, match="not the published file"):
        pictures.fashion_mnist("test", tmp_path)


# ---------------------------------------------------------------------------------------- digits


def test_digits_are_divided_once_and_for_all():
    from sklearn.datasets import load_digits

    train, test = pictures.digits("train"), pictures.digits("test")
    assert train.pixels.shape == (1197, 8, 8)
    assert test.pixels.shape == (600, 8, 8)
    assert train.top == max(train.pixels.max(), test.pixels.max()) == 16

    # Together they are the whole, each picture once, with its own label.
    def rows(pixels, labels):
        table = np.column_stack([pixels.reshape(len(labels), -1), labels]).astype(np.int64)
        return table[np.lexsort(table.T)]

    bunch = load_digits()
    both = rows(
        np.concatenate([train.pixels, test.pixels]), np.concatenate([train.labels, test.labels])
    )
    assert np.array_equal(both, rows(bunch.images, bunch.target))
    # A third of each class is in the test set.
    share = np.bincount(test.labels) / np.bincount(bunch.target)
    assert np.all(np.abs(share - 1 / 3) < 0.02)
    assert np.array_equal(pictures.digits("test").pixels, test.pixels)


# -------------------------------------------------------------------------------------- division

LABELS_10 = np.arange(1000, dtype=np.int64) % 10
DIVISION = """
import hashlib, sys
sys.path.append(sys.argv[1])
import numpy as np
from example_data import split
labels = np.arange(1000, dtype=np.int64) % 10
shared, proxy = split.pool(labels, subset=800, proxy=100, seed=3)
parts = split.divide(labels[shared], parts=4, alpha=0.5, seed=3)
train, val = split.carve(labels[shared[parts[1]]], fraction=0.1, part=1, seed=3)
everything = np.concatenate([shared, proxy, *parts, train, val]).astype("<i8")
print(hashlib.sha256(everything.tobytes()).hexdigest())
"""


def test_another_process_computes_the_same_division():
    """Also the same as when this was written: a change would make sites of two releases overlap."""
    answers = [
        subprocess.run(
            [sys.executable, "-c", DIVISION, str(EXAMPLES)],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    ]
    assert set(answers) == {"48a748c16dbe99c556bc4db91a1495f41454456aa997f7b83387b8920a89b6cf"}


def test_a_smaller_alpha_is_more_skewed():
    def skew(alpha):
        """Mean total variation between the classes of a part and those of the whole."""
        parts = split.divide(LABELS_10, parts=5, alpha=alpha, seed=1)
        mixes = [np.bincount(LABELS_10[part], minlength=10) / len(part) for part in parts]
        return np.mean([np.abs(mix - 0.1).sum() / 2 for mix in mixes])

    assert skew(1000.0) < 0.1 < skew(1.0) < skew(0.1)
    assert skew(0) < 0.15
    assert skew(0.1) > 0.5


def test_other_seeds_and_parts_divide_otherwise():
    def first(seed, parts=4):
        return split.divide(LABELS_10, parts=parts, alpha=0.5, seed=seed)[0]

    assert not np.array_equal(first(1), first(2))
    assert not np.array_equal(first(1), first(1, parts=5))
    orders = [split.pool(LABELS_10, subset=0, proxy=0, seed=seed).shared for seed in (1, 2)]
    assert not np.array_equal(*orders)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: split.pool(LABELS_10, subset=901, proxy=100, seed=0),
        lambda: split.pool(LABELS_10, subset=0, proxy=1000, seed=0),
        lambda: split.pool(LABELS_10, subset=0, proxy=2000, seed=0),
        lambda: split.divide(LABELS_10[:9], parts=5, alpha=0, seed=0),
        lambda: split.divide(LABELS_10, parts=0, alpha=0, seed=0),
        lambda: split.divide(LABELS_10, parts=2, alpha=-1.0, seed=0),
        lambda: split.divide(LABELS_10, parts=2, alpha=1e-9, seed=0),
        lambda: split.divide(LABELS_10, parts=2, alpha=float("nan"), seed=0),
    ],
)
def test_what_can_not_be_divided_is_said(ask):
    with pytest.raises(split.SplitError):
        ask()
