"""Digits with noise and Fashion-MNIST, each site with training, validation and test data of its own.

A site's three sets have the same mixture of classes, so that what is promised of the sites' mixture
(conformal coverage, a temperature) can be looked for at the sites. Validation and test pictures are
drawn anew from the site's held-out ones for each ``draw``, while what it trains on stays.
"""

from __future__ import annotations

from functools import cache, cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.random import RandomState
from numpy.typing import NDArray
from pydantic import Field
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.tasks.pictures import fashion_mnist
from farflung import Options, Task

CLASSES = 10
LEAST = 4  # pictures of a site: none is left without


class HeldOut(Task):
    """Small pictures, a perceptron with two hidden layers."""

    class Params(Options):
        """The run's parameters.

        Attributes:
            data: Which pictures; of Fashion-MNIST the 10,000 of its test half, or all 70,000.
            seed: Of the choice of pictures, their division over the sites, and their noise.
            alpha: Concentration of the Dirichlet label skew; 0 divides at random.
            train: Pictures to train on, all sites together.
            held: Pictures held out, all sites together.
            val: Share of the held-out ones that validates; the others test.
            draw: Which division into the two.
            noise: Standard deviation of Gaussian noise on pixels from 0 to 1.
            copies: How often each held-out picture is there, each time with noise of its own.
            width: Of the hidden layers.
        """

        data: Literal["digits", "fashion_mnist", "fashion_mnist_all"] = "digits"
        seed: int = Field(0, ge=0, lt=2**32)
        alpha: float = Field(0.0, ge=0.0)
        train: int = Field(400, ge=50)
        held: int = Field(1000, ge=50)
        val: float = Field(0.3, gt=0, lt=1)
        draw: int = Field(0, ge=0, lt=2**32)
        noise: float = Field(0.0, ge=0)
        copies: int = Field(1, ge=1)
        width: int = Field(128, ge=1)

    class Settings(Options):
        """This site's part.

        Attributes:
            part: From 0 to parts - 1; None at the orchestrator, which gets none.
            parts: Of how many.
        """

        part: int | None = Field(None, ge=0)
        parts: int = Field(5, ge=1)

    params: Params
    settings: Settings

    def model(self) -> nn.Module:
        pixels = 64 if self.params.data == "digits" else 784
        layers: list[nn.Module] = []
        width = self.params.width
        for wide in pairwise((pixels, width, width, CLASSES)):
            layers += [nn.Linear(*wide), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def train_data(self) -> TensorDataset:
        return self._set(self._parts[0])

    def val_data(self) -> TensorDataset | None:
        return None if self.settings.part is None else self._set(self._held[0], self.params.copies)

    def test_data(self) -> TensorDataset | None:
        return None if self.settings.part is None else self._set(self._held[1], self.params.copies)

    @cached_property
    def _parts(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """This site's pictures to train on, and those held out."""
        if self.settings.part is None:
            raise LookupError("held_out: the orchestrator has no pictures")
        random = RandomState([self.params.seed, 0])
        labels = pictures(self.params.data)[1]
        train, held = self.params.train, self.params.held
        if train + held > len(labels):
            raise ValueError(f"{train} + {held} pictures are asked for, there are {len(labels)}")
        order = random.permutation(len(labels))
        shares = self._shares(random)
        return tuple(  # type: ignore[return-value]
            deal(chosen, labels[chosen], shares)[self.settings.part]
            for chosen in (order[:train], order[train : train + held])
        )

    def _shares(self, random: RandomState) -> NDArray[np.float64]:
        """Share of each class at each site, (classes, sites)."""
        parts = self.settings.parts
        if not self.params.alpha:
            return np.full((CLASSES, parts), 1 / parts)
        while True:
            shares = random.dirichlet([self.params.alpha] * parts, CLASSES)
            if shares.sum(0).min() > 0.2:  # of ten: nobody is left with next to nothing
                return shares

    @cached_property
    def _held(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        held = self._parts[1]
        random = RandomState([self.params.seed, 1 + self.params.draw, self.settings.part or 0])
        order, count = random.permutation(held), round(self.params.val * len(held))
        return order[:count], order[count:]

    def _set(self, chosen: NDArray[np.int64], copies: int = 1) -> TensorDataset:
        pixels, labels = pictures(self.params.data)
        out = np.concatenate([pixels[chosen]] * copies).astype(np.float32)
        if self.params.noise:
            for row, (k, index) in zip(out, np.ndindex(copies, len(chosen)), strict=True):
                random = RandomState([self.params.seed, 9 + k, int(chosen[index])])
                row += self.params.noise * random.standard_normal(row.shape)
        inputs: Tensor = torch.from_numpy(out)
        return TensorDataset(inputs, torch.from_numpy(np.tile(labels[chosen], copies)))


HELD_OUT = HeldOut


def deal(
    chosen: NDArray[np.int64], labels: NDArray[np.int64], shares: NDArray[np.float64]
) -> list[NDArray[np.int64]]:
    """Deals pictures to sites: of each class to each site its share."""
    parts: list[list[int]] = [[] for _ in range(shares.shape[1])]
    for label, share in enumerate(shares):
        members = chosen[labels == label]
        cuts = np.round(np.cumsum(share)[:-1] * len(members)).astype(int)
        for part, some in zip(parts, np.split(members, cuts), strict=True):
            part.extend(some.tolist())
    for part in parts:
        while len(part) < LEAST:
            part.append(max(parts, key=len).pop())
    return [np.array(part, dtype=np.int64) for part in parts]


@cache
def pictures(data: str) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Pixels from 0 to 1, (n, pixels), and classes, (n,)."""
    if data == "digits":
        digits = load_digits()
        return (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
    halves = ("t10k", "train") if data == "fashion_mnist_all" else ("t10k",)
    found = [fashion_mnist(half) for half in halves]
    pixels = np.concatenate([images for images, _ in found]).reshape(-1, 784)
    return pixels.astype(np.float32) / 255, np.concatenate([labels for _, labels in found])
