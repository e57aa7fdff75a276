"""Three tasks on small grey-scale pictures: Fashion-MNIST, digits, and digits with adapters.

A site names a task in its ``site.toml``::

    [tasks.fashion_mnist]
    source = "deploy/examples/images.py:FashionMnist"
    settings = { part = 0, parts = 3 }

The pictures are public, so one collection plays several data centers: every site reads it whole and
keeps the part that its settings name. That is the only thing here which a real data center would
not do; its task reads what lies there.

Four sets that share no picture: ``train`` and ``val`` of each part, ``proxy`` (held back from all
parts, used without labels at the orchestrator), and ``test``, the same official one at every site,
so that any two models of a run are scored on the same pictures.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
import torch
from example_data import split
from example_data.pictures import (
    CLASSES,
    FASHION_MNIST_FOLDER,
    Half,
    Pictures,
    digits,
    fashion_mnist,
)
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from farflung import Options, Task

Width = Annotated[int, Field(ge=1, le=8192)]

_NOISE = {"train": 0, "test": 1}  # one random stream for each half


class PartMissingError(ValueError):
    """The settings don't say which part of the pictures is this site's."""


class ImageTask(Task):
    """What the tasks of this file share: who gets which picture, and as what tensor."""

    class Params(Options):
        """The run's parameters; the same at every site, so that the parts fit together.

        Attributes:
            split_seed: Seed of the division over sites (and of `noise`).
            alpha: Label skew: Dirichlet concentration, small is skewed; 0 is IID.
            subset: Training pictures used by all sites together, the same ones each time;
                0 is all.
            proxy: Pictures held back from all sites, used without labels at the orchestrator.
            val_fraction: Share of a site's part that validates and isn't trained on.
            noise: Standard deviation of Gaussian noise added to all pictures, where the darkest
                pixel is 0 and the brightest 1. Makes small pictures hard enough to be unsure of.
        """

        split_seed: int = Field(0, ge=0, lt=2**32)
        alpha: float = Field(0.0, ge=0.0, le=1e6)
        subset: int = Field(0, ge=0)
        proxy: int = Field(0, ge=0)
        val_fraction: float = Field(0.1, gt=0.0, lt=1.0)
        noise: float = Field(0.0, ge=0.0, le=10.0)

    class Settings(Options):
        """What only this site knows; never sent.

        Attributes:
            part: This site's part, 0 to parts - 1. None at the orchestrator, which gets no part.
            parts: How many parts there are: all sites must say the same.
        """

        part: int | None = Field(None, ge=0)
        parts: int = Field(1, ge=1)

    params: Params
    settings: Settings

    # Pixels, from 0 to 1, are shifted by the mean of the collection and divided by its deviation.
    mean: ClassVar[float] = 0.0
    deviation: ClassVar[float] = 1.0

    def collection(self, half: Half) -> Pictures:
        """Reads one half of the collection."""
        raise NotImplementedError

    def train_data(self) -> TensorDataset:
        """This site's pictures to train on, and their labels."""
        return self._part[0]

    def val_data(self) -> TensorDataset | None:
        """This site's pictures that steer the run and are not trained on.

        None where the settings name no part, as at the orchestrator.
        """
        return None if self.settings.part is None else self._part[1]

    def test_data(self) -> TensorDataset:
        """The test pictures: all of them, at every site, only reported."""
        test = self.collection("test")
        everything = np.arange(len(test.labels), dtype=np.int64)
        return TensorDataset(self._tensor(test, everything, "test"), torch.from_numpy(test.labels))

    def proxy_data(self) -> TensorDataset | None:
        """Pictures that no site has, without labels. None if the run sets none aside."""
        if not self.params.proxy:
            return None
        train = self.collection("train")
        _, proxy = self._pool(train)
        return TensorDataset(self._tensor(train, proxy, "train"))

    def arrange(self, pixels: Tensor) -> Tensor:
        """Brings pixels (n, height, width) into the shape that the model takes."""
        return pixels.flatten(1)

    @cached_property
    def _part(self) -> tuple[TensorDataset, TensorDataset]:
        part, parts = self.settings.part, self.settings.parts
        if part is None or part >= parts:
            raise PartMissingError(
                f"which pictures are this site's? Its settings say part = {part}, parts = {parts}; "
                f"set parts to the number of sites, and part to 0 ... {parts - 1}, another at each"
            )
        train, seed = self.collection("train"), self.params.split_seed
        shared = self._pool(train).shared
        members = split.divide(
            train.labels[shared], parts=parts, alpha=self.params.alpha, seed=seed
        )[part]
        mine = shared[members]
        halves = split.carve(
            train.labels[mine], fraction=self.params.val_fraction, part=part, seed=seed
        )
        to_train, to_validate = (
            TensorDataset(
                self._tensor(train, mine[half], "train"), torch.from_numpy(train.labels[mine[half]])
            )
            for half in halves
        )
        return to_train, to_validate

    def _pool(self, train: Pictures) -> split.Pool:
        return split.pool(
            train.labels,
            subset=self.params.subset,
            proxy=self.params.proxy,
            seed=self.params.split_seed,
        )

    def _tensor(self, source: Pictures, chosen: split.Indices, half: Half) -> Tensor:
        pixels = source.pixels[chosen].astype(np.float32) / source.top
        if self.params.noise:
            seed = self.params.split_seed
            for pixel, index in zip(pixels, chosen, strict=True):
                # A stream for each picture: its noise is the same whichever site it is at.
                random = np.random.RandomState([seed, _NOISE[half], int(index)])
                pixel += self.params.noise * random.standard_normal(pixel.shape)
        return self.arrange(torch.from_numpy((pixels - self.mean) / self.deviation))


class FashionMnist(ImageTask):
    """Fashion-MNIST with a small convolutional network, without normalisation layers.

    Patches of 4×4 pixels, one convolution over them, a linear layer: 10,442 parameters at width 16.
    """

    class Params(ImageTask.Params):
        """The run's parameters.

        Attributes:
            width: Channels of both convolutions.
            student_width: The same of the student (strategy `student`): 21 % of the parameters.
        """

        width: int = Field(16, ge=1, le=256)
        student_width: int = Field(4, ge=1, le=256)

    class Settings(ImageTask.Settings):
        """What only this site knows; never sent.

        Attributes:
            root: Folder of the four ``.gz`` files.
            verify: Whether they must be the published ones.
        """

        root: Path = FASHION_MNIST_FOLDER
        verify: bool = True

    params: Params
    settings: Settings
    mean = 0.2860
    deviation = 0.3530
    input_shape = (1, 28, 28)

    def model(self) -> nn.Module:
        """The network: (n, 1, 28, 28) → (n, 10)."""
        return self._network(self.params.width)

    def student(self) -> nn.Module:
        """The same with fewer channels."""
        return self._network(self.params.student_width)

    def _network(self, width: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, width, kernel_size=4, stride=4),  # → (n, width, 7, 7)
            nn.ReLU(),
            nn.Conv2d(width, width, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(width * 7 * 7, CLASSES),
        )

    def collection(self, half: Half) -> Pictures:
        """Reads one half of Fashion-MNIST."""
        return fashion_mnist(half, self.settings.root, verify=self.settings.verify)

    def arrange(self, pixels: Tensor) -> Tensor:
        """One channel: (n, 28, 28) → (n, 1, 28, 28)."""
        return pixels.unsqueeze(1)


class Digits(ImageTask):
    """scikit-learn's digits with a multilayer perceptron: 4,810 parameters at 64-64-10."""

    class Params(ImageTask.Params):
        """The run's parameters.

        Attributes:
            hidden: Widths of the hidden layers.
            student_hidden: The same of the student (strategy `student`): 24 % of the parameters.
        """

        hidden: tuple[Width, ...] = Field((64,), max_length=8)
        student_hidden: tuple[Width, ...] = Field((15,), max_length=8)

    params: Params
    input_shape = (64,)

    def model(self) -> nn.Module:
        """The network: (n, 64) → (n, 10).

        Weights start as He et al. proposed for rectifiers (arXiv 1502.01852): torch's smaller
        default learns less in the first rounds (docs/evidence.md).
        """
        return self._network(self.params.hidden)

    def student(self) -> nn.Module:
        """The same with narrower hidden layers."""
        return self._network(self.params.student_hidden)

    def _network(self, hidden: tuple[int, ...]) -> nn.Module:
        widths = (64, *hidden)
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise((*widths, CLASSES)):
            layer = nn.Linear(fan_in, fan_out)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
            layers += [layer, nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def collection(self, half: Half) -> Pictures:
        """Reads one half of the digits."""
        return digits(half)


class DigitsLora(ImageTask):
    """Digits with low-rank adapters beside a frozen base (LoRA: Hu et al., arXiv 2106.09685).

    The base, 64-256-256, is known everywhere and never travels: it follows from `base_seed` by
    whole-number arithmetic, to the bit on any machine. Adapters and head travel: 5,898 of 88,330
    values at width 256 and rank 4. A random base stands in for a trained one; that the shared part
    is small, and the frozen one the same everywhere, is what this task is there to show.
    """

    class Params(ImageTask.Params):
        """The run's parameters.

        Attributes:
            base_seed: Which frozen base.
            width: Width of its two hidden layers.
            rank: Rank of the adapters.
        """

        base_seed: int = Field(0, ge=0, lt=2**32)
        width: Width = 256
        rank: int = Field(4, ge=1, le=256)

    params: Params

    def model(self) -> nn.Module:
        """The network: (n, 64) → (n, 10). What is frozen has ``requires_grad`` False."""
        random = np.random.RandomState(self.params.base_seed)
        width, rank = self.params.width, self.params.rank
        return nn.Sequential(
            LowRankLinear(64, width, rank, random),
            nn.ReLU(),
            LowRankLinear(width, width, rank, random),
            nn.ReLU(),
            nn.Linear(width, CLASSES),
        )

    def collection(self, half: Half) -> Pictures:
        """Reads one half of the digits."""
        return digits(half)


class LowRankLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank correction: (W + up · down) x + b.

    `up` begins at zero, so an untrained adapter changes nothing.

    Args:
        fan_in: Width of the input.
        fan_out: Width of the output.
        rank: Rank of the correction.
        random: Source of the frozen weights.
    """

    def __init__(self, fan_in: int, fan_out: int, rank: int, random: np.random.RandomState) -> None:
        super().__init__()
        # Uniform, not normal: its bits need no logarithm, whose last bit differs between systems.
        bound = (6.0 / fan_in) ** 0.5
        frozen = torch.from_numpy((2.0 * random.random_sample((fan_out, fan_in)) - 1.0) * bound)
        self.weight = nn.Parameter(frozen.float(), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(fan_out), requires_grad=False)
        self.down = nn.Parameter(torch.empty(rank, fan_in))
        self.up = nn.Parameter(torch.zeros(fan_out, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(n, fan_in) → (n, fan_out)."""
        correction: Tensor = F.linear(F.linear(x, self.down), self.up)
        return F.linear(x, self.weight, self.bias) + correction
