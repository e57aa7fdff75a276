"""D8: scikit-learn's 1,797 digits, 8 x 8: some with labels at the sites, many without at the orchestrator.

No two sets share a picture. The digits are public, so every process reads all of them and keeps the
part that its settings name.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.tasks.part import Part
from benchmarks.tasks.pictures import Data, small_pictures
from farflung import Options, Task

CLASSES = 10
LABELLED = 300
"""Labels that the trees have which learn from labels."""


class D8(Task):
    """Digits and a perceptron with one hidden layer."""

    input_shape = (1, 8, 8)

    class Params(Options):
        """The run's parameters.

        Attributes:
            seed: Of the division.
            train: Training samples of all sites together.
            proxy: Unlabelled samples at the orchestrator.
            hidden: Width of the hidden layer.
            data: Clothes may take the digits' place.
        """

        seed: int = Field(0, ge=0, lt=2**32)
        train: int = Field(400, ge=1)
        proxy: int = Field(1000, ge=0)
        hidden: int = Field(64, ge=1)
        data: Data = "digits"

    Settings = Part
    params: Params
    settings: Part

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, self.params.hidden),
            nn.ReLU(),
            nn.Linear(self.params.hidden, CLASSES),
        )

    def train_data(self) -> TensorDataset:
        mine = self.settings.of(self.division[0])
        return self.data(mine)

    def test_data(self) -> TensorDataset:
        return self.data(self.division[2])

    def proxy_data(self) -> TensorDataset:
        return TensorDataset(self.data(self.division[1]).tensors[0])

    def data(self, chosen: NDArray[np.int64]) -> TensorDataset:
        """Some of the digits, with labels."""
        pixels, labels = self._digits
        rows = torch.from_numpy(chosen)
        return TensorDataset(pixels[rows], labels[rows])

    @cached_property
    def _digits(self) -> tuple[Tensor, Tensor]:
        pixels, labels = small_pictures(self.params.data)
        return torch.from_numpy(pixels)[:, None], torch.from_numpy(labels)

    @cached_property
    def division(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Positions of the training, proxy and test samples."""
        order = np.random.default_rng(self.params.seed).permutation(len(self._digits[1]))
        train, proxy = self.params.train, self.params.proxy
        return order[:train], order[train : train + proxy], order[train + proxy :]


def controls(seed: int, data: Data = "digits") -> dict[str, dict[str, float]]:
    """Trees of the same depth that learn from labels: of one site, of 300 pictures, and CART of those."""
    from sklearn.tree import DecisionTreeClassifier

    from strategies.context import seeded
    from strategies.trees.soft_tree import SoftTree, grow

    task, like = D8(D8.Params(seed=seed, data=data)), SoftTree()
    unseen, truth = task.test_data().tensors

    def soft(samples: TensorDataset, name: str) -> dict[str, float]:
        inputs, labels = samples.tensors
        tree = grow(
            inputs,
            F.one_hot(labels, CLASSES).float(),
            depth=like.depth,
            steps=like.steps,
            learning_rate=like.learning_rate,
            batch_size=like.batch_size,
            strength=like.strength,
            generator=seeded(seed, name),
        )
        with torch.no_grad():
            right = (tree(unseen).argmax(dim=1) == truth).double().mean()
        return {"test.accuracy": float(right)}

    some = task.data(task.division[0][:LABELLED])
    inputs, labels = some.tensors
    cart = DecisionTreeClassifier(max_depth=like.depth, random_state=seed)
    cart.fit(inputs.flatten(1).numpy(), labels.numpy())
    return {
        "site": soft(task.train_data(), "site"),
        "labels": soft(some, "hard"),
        "cart": {"test.accuracy": float(cart.score(unseen.flatten(1).numpy(), truth.numpy()))},
    }
