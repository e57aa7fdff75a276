"""Two collections of small pictures: Fashion-MNIST from a folder, digits from scikit-learn.

Each has an official or fixed test set that no site trains on, the same at every site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from example_data.idx import IdxError, read_idx
from example_data.split import balanced_order

FASHION_MNIST_PACKAGE = "dataset-fashion-mnist"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
CLASSES = 10
DIGITS_TEST_IMAGES = (
    600  # a third of the 1,797, as in the pilots that the evidence is compared with
)
DIGITS_TEST_SEED = 0  # fixed: a test set that moved with the split would leak between runs

Half = Literal["train", "test"]


class ImagesMissingError(FileNotFoundError):
    """A collection of images is not on this machine; the message says how to get it."""


class Pictures(NamedTuple):
    """Labelled grey-scale pictures.

    Attributes:
        pixels: (n, height, width), uint8 in 0..top.
        labels: (n,), int64 in 0..9.
        top: The pixel value that means white.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    top: int


class _IdxPair(NamedTuple):
    stem: str
    pictures: int
    images_sha256: str
    labels_sha256: str


_FASHION_MNIST: dict[Half, _IdxPair] = {
    "train": _IdxPair(
        "train",
        60_000,
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    "test": _IdxPair(
        "t10k",
        10_000,
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}


def fashion_mnist(
    half: Half, folder: Path = FASHION_MNIST_FOLDER, *, verify: bool = True
) -> Pictures:
    """Reads one half of Fashion-MNIST (Xiao, Rasul, Vollgraf, arXiv 1708.07747).

    Args:
        half: ``"train"`` (60,000 pictures) or ``"test"`` (10,000), 28×28, ten balanced classes.
        folder: Where the four ``.gz`` files are.
        verify: Whether the files must be the published ones. False takes any data in the same
            format, with as many pictures as it has.

    Raises:
        ImagesMissingError: A file is not there; the message names the package that brings it.
        IdxError: A file is damaged or another one, or its labels don't fit its images.
    """
    known = _FASHION_MNIST[half]
    images, labels = (folder / name for name in _file_names(known))
    absent = [path.name for path in (images, labels) if not path.is_file()]
    if absent:
        raise ImagesMissingError(
            f"Fashion-MNIST: {', '.join(absent)} not found in {folder}. Install the Debian "
            f"package (apt-get install {FASHION_MNIST_PACKAGE}), or set `root` in the task's "
            f"settings to a folder with the four .gz files."
        )
    count = known.pictures if verify else None
    pixels = read_idx(images, (count, 28, 28), sha256=known.images_sha256 if verify else None)
    classes = read_idx(labels, (len(pixels),), sha256=known.labels_sha256 if verify else None)
    if classes.max() >= CLASSES:
        raise IdxError(f"{labels}: holds label {classes.max()}; labels are 0 to {CLASSES - 1}")
    return Pictures(pixels, classes.astype(np.int64), top=255)


def fashion_mnist_installed(folder: Path = FASHION_MNIST_FOLDER) -> bool:
    """Whether all four files are in `folder` (their content isn't looked at)."""
    return all(
        (folder / name).is_file()
        for known in _FASHION_MNIST.values()
        for name in _file_names(known)
    )


def digits(half: Half) -> Pictures:
    """Gives one half of scikit-learn's digits: 8×8, ten classes, pixels 0 to 16.

    The 1,797 pictures come without an official division, so 600 of them, with the class
    proportions of the whole, are the test set, always the same ones; 1,197 remain to train on.

    Raises:
        ImagesMissingError: scikit-learn is not installed.
    """
    try:
        # Here and not above: this import takes a second, which Fashion-MNIST need not pay.
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImagesMissingError(
            "digits: they come with scikit-learn, which is not installed (pip install scikit-learn)"
        ) from error
    bunch = load_digits()
    pixels = np.asarray(bunch.images).astype(np.uint8)
    labels = np.asarray(bunch.target).astype(np.int64)
    order = balanced_order(labels, np.random.RandomState(DIGITS_TEST_SEED))
    test, train = np.sort(order[:DIGITS_TEST_IMAGES]), np.sort(order[DIGITS_TEST_IMAGES:])
    chosen = {"train": train, "test": test}[half]
    return Pictures(pixels[chosen], labels[chosen], top=16)


def _file_names(pair: _IdxPair) -> tuple[str, str]:
    return f"{pair.stem}-images-idx3-ubyte.gz", f"{pair.stem}-labels-idx1-ubyte.gz"
