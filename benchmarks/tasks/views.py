"""M5 without labels: two views of a digit are alike, or a lent teacher says what is.

One site, whose setting is ``lends``, has trained a wide encoder by SimCLR on all training pictures
and lends it. The others have their part of the pictures and a narrow student. Validation and test
digits have labels, for the probes only.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.tasks.m5 import M5, SIDE
from benchmarks.tasks.pictures import Data
from farflung import Options, Task
from strategies.distillation import probe

UNLABELLED = -1


class VIEWS(Task):
    """Shifted, noisy views of handwritten digits and an encoder."""

    class Params(Options):
        """The run's parameters.

        Attributes:
            data: Clothes may take the digits' place.
            seed: Of the choice of the pictures, their division, and the teacher.
            train: Training pictures of all sites together.
            test: Test digits.
            student: Width of the student.
            teacher: Width of the teacher.
            views: Of each picture in a step: 2 for SimCLR, 1 where a teacher is asked.
            lessons: Epochs of the teacher's own training at the site that lends it.
        """

        data: Data = "digits"
        seed: int = Field(0, ge=0, lt=2**32)
        train: int = Field(2000, ge=1)
        test: int = Field(500, ge=1)
        student: int = Field(12, ge=1)
        teacher: int = Field(256, ge=1)
        views: int = Field(2, ge=1, le=2)
        lessons: int = Field(60, ge=0)

    class Settings(Options):
        """This site's part.

        Attributes:
            part: From 0 to parts - 1; None has all of them.
            parts: Of how many.
            lends: Whether the teacher's weights are made here.
        """

        part: int | None = Field(None, ge=0)
        parts: int = Field(3, ge=1)
        lends: bool = False

    features = frozenset[str]()
    embedding = "encoder.embed"
    params: Params
    settings: Settings

    def model(self) -> nn.Module:
        return encoder(self.params.student)

    def teacher(self) -> nn.Module:
        return cast(nn.Sequential, self._teacher).encoder

    def train_data(self) -> TensorDataset:
        pixels = cast(TensorDataset, self._digits.train_data()).tensors[0]
        return TensorDataset(pixels, torch.full((len(pixels),), UNLABELLED))

    def val_data(self) -> TensorDataset:
        return self._digits.val_data()

    def test_data(self) -> TensorDataset:
        return self._digits.test_data()

    def unpack(self, batch: Any) -> tuple[Tensor, Tensor]:
        pixels, targets = batch
        if len(targets) and targets[0] == UNLABELLED:
            pixels = torch.cat([view(pixels) for _ in range(self.params.views)])
        return pixels, targets

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        parts = cast(Any, model)
        embedded = cast(Tensor, parts.encoder(inputs))
        if model.training and self.params.views == 2:
            return cast(Tensor, parts.projector(embedded))
        return embedded

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """SimCLR's where there are two views, else nothing."""
        return alike(outputs) if len(outputs) == 2 * len(targets) else 0 * outputs.sum()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {
            "linear_probe": probe.linear(outputs, targets),
            "nearest_5": probe.nearest(outputs, targets),
        }

    @cached_property
    def _digits(self) -> M5:
        own = self.params
        params = M5.Params(data=own.data, seed=own.seed, train=own.train, val=10, test=own.test)
        return M5(params, M5.Settings(part=self.settings.part, parts=self.settings.parts))

    @cached_property
    def _teacher(self) -> nn.Module:
        """Trained here by the site that lends it; elsewhere only its shapes count."""
        with torch.random.fork_rng():
            torch.manual_seed(self.params.seed)
            model = encoder(self.params.teacher)
            if self.settings.lends:
                train(model, self.train_data().tensors[0], self.params.lessons)
        return model


def encoder(width: int) -> nn.Module:
    """Encoder and projector."""
    body = OrderedDict(
        hidden=nn.Linear(SIDE * SIDE, width), relu=nn.ReLU(), embed=nn.Linear(width, width)
    )
    projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 64))
    return nn.Sequential(OrderedDict(encoder=nn.Sequential(body), projector=projector))


def train(model: Any, pixels: Tensor, epochs: int) -> None:
    """SimCLR with Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels)).split(250):
            both = torch.cat([view(pixels[chosen]) for _ in range(2)])
            loss = alike(model.projector(model.encoder(both)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def view(pixels: Tensor) -> Tensor:
    """Shifted by up to two pixels each way, and noisy."""
    n = len(pixels)
    framed = F.pad(pixels.reshape(n, SIDE, SIDE), (2, 2, 2, 2), value=float(pixels.min()))
    rows, columns = torch.randint(0, 5, (2, n, 1))
    at = torch.arange(SIDE)
    every = torch.arange(n)[:, None, None]
    shifted = framed[every, (rows + at)[:, :, None], (columns + at)[:, None, :]]
    return shifted.reshape(n, -1) + 0.3 * torch.randn(n, SIDE * SIDE)


def alike(outputs: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent of (2n, features): row i and row n + i are two views of one picture."""
    z = F.normalize(outputs, dim=1)
    similarity = (z @ z.T / temperature).fill_diagonal_(-1e9)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))
