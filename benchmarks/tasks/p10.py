"""P10: patches of ten real photographs and textures of the scikit-image wheel; which one is it?

Training patches come from the left halves, validation and test patches from the right halves, so
no pixel is in both. Every site can make all patches and keeps the part that its settings name.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.tasks.part import Part
from benchmarks.tasks.pictures import Cut, clothes
from farflung import Options, Task

PHOTOGRAPHS = (
    "astronaut", "brick", "chelsea", "coffee", "coins", "grass", "gravel", "rocket",
    "hubble_deep_field", "retina",
)  # fmt: skip
SIDE = 24


class P10(Task):
    """Ten photographs and a small convolutional network: two layers of trunk, then a tail."""

    class Params(Options):
        """The run's parameters.

        Attributes:
            seed: Of the choice of the patches.
            train: Training patches of all sites together.
            val: Validation patches.
            test: Test patches.
            data: Clothes, whole ones, may take the place of what is cut from photographs.
        """

        seed: int = Field(0, ge=0, lt=2**32)
        train: int = Field(600, ge=10)
        val: int = Field(200, ge=10)
        test: int = Field(1000, ge=10)
        data: Cut = "photographs"

    Settings = Part
    params: Params
    settings: Part

    def model(self) -> nn.Module:
        def stage(channels: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU()
            )

        tail = nn.Sequential(
            stage(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(PHOTOGRAPHS))
        )
        return nn.Sequential(
            OrderedDict(
                low=nn.Sequential(stage(1, 16), nn.MaxPool2d(2)),
                middle=nn.Sequential(stage(16, 32), nn.MaxPool2d(2)),
                tail=tail,
            )
        )

    def train_data(self) -> TensorDataset:
        order = np.random.default_rng([self.params.seed, 9]).permutation(self.params.train)
        chosen = np.sort(self.settings.of(order))
        pixels, labels = self._patches("left", self.params.train, 0).tensors
        return TensorDataset(pixels[chosen], labels[chosen])

    def val_data(self) -> TensorDataset:
        return self._patches("right", self.params.val, 1)

    def test_data(self) -> TensorDataset:
        return self._patches("right", self.params.test, 2)

    def _patches(self, half: str, count: int, stream: int) -> TensorDataset:
        generator = np.random.default_rng([self.params.seed, stream])
        labels = np.arange(count) % len(PHOTOGRAPHS)
        if self.params.data == "fashion-mnist":
            patches = clothes("train" if half == "left" else "t10k", labels, generator)
        else:
            patches = np.stack([cut(self._photographs[i], half, generator) for i in labels])
        pixels = torch.from_numpy(patches).float()
        return TensorDataset(4 * (pixels[:, None] - 0.45), torch.from_numpy(labels))

    @cached_property
    def _photographs(self) -> list[NDArray[np.float64]]:
        from skimage import color, data, util

        pictures = [util.img_as_float(getattr(data, name)()) for name in PHOTOGRAPHS]
        return [color.rgb2gray(p) if p.ndim == 3 else p for p in pictures]


def cut(
    picture: NDArray[np.float64], half: str, generator: np.random.Generator
) -> NDArray[np.float64]:
    """A square of one half of a grey picture."""
    height, width = picture.shape
    low, high = (0, width // 2) if half == "left" else (width // 2, width)
    top = generator.integers(0, height - SIDE + 1)
    left = generator.integers(low, high - SIDE + 1)
    return picture[top : top + SIDE, left : left + SIDE]
