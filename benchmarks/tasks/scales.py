"""M5 as re-identification: learn the digits 0 to 5, find 6 to 9 again, seen at three scales.

A picture at scale s is made smaller by s and large again, as a camera far away would see it.
Training pictures have a scale each. In the test, half of the pictures are the gallery, at scale 1,
and the other half are queries.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.tasks.part import Part
from benchmarks.tasks.pictures import Data, pictures
from farflung import Options, Task

KNOWN = 6
LEVELS = ("level0", "level1", "level2")
SCALES_SEEN = (1.0, 0.4, 0.25)
QUERY = 100
"""Added to a target that is a query."""


class SCALES(Task):
    """A convolutional network of three levels, the lower two with classifiers of the strategy's."""

    class Params(Options):
        """The run's parameters.

        Attributes:
            data: Clothes may take the digits' place.
            seed: Of the choice of the pictures.
            train: Training pictures of all sites together.
            test: Test pictures, half of them queries; at most 512, so that they are one batch.
        """

        data: Data = "digits"
        seed: int = Field(0, ge=0, lt=2**32)
        train: int = Field(1500, ge=1)
        test: int = Field(512, ge=2, le=512)

    Settings = Part
    features = frozenset({"logits"})
    params: Params
    settings: Part

    def model(self) -> nn.Module:
        def level(channels: int, width: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(4, width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )

        levels = OrderedDict(level0=level(1, 16), level1=level(16, 32), level2=level(32, 64))
        rest = OrderedDict(
            pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(64, KNOWN)
        )
        return nn.Sequential(OrderedDict(**levels, **rest))

    def train_data(self) -> TensorDataset:
        pixels, labels = self._pictures
        generator = np.random.default_rng(self.params.seed)
        order = generator.permutation(np.flatnonzero(labels.numpy() < KNOWN))[: self.params.train]
        mine = self.settings.of(order)
        drawn = np.random.default_rng([self.params.seed, self.settings.part])
        return TensorDataset(seen(pixels[mine], drawn), labels[mine])

    def test_data(self) -> TensorDataset:
        pixels, labels = self._pictures
        generator = np.random.default_rng([self.params.seed, 7])
        order = generator.permutation(np.flatnonzero(labels.numpy() >= KNOWN))[: self.params.test]
        half = len(order) // 2
        gallery, queries = order[:half], order[half:]
        return TensorDataset(
            torch.cat([pixels[gallery], seen(pixels[queries], generator)]),
            torch.cat([labels[gallery], labels[queries] + QUERY]),
        )

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits in training; in evaluation features and logits of all levels, one behind the other."""
        if model.training:
            return super().forward(model, inputs)
        features: list[Tensor] = []
        logits: list[Tensor] = []
        for name in LEVELS:
            level = model.get_submodule(name)
            inputs = level(inputs)
            pooled = inputs.mean(dim=(2, 3))
            features.append(F.normalize(pooled, dim=1))
            logits.append(getattr(level, "level_head", model.get_submodule("head"))(pooled))
        return torch.cat([*features, *logits], dim=1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in training; features have none."""
        if outputs.shape[1] != KNOWN:
            return torch.zeros(())
        return super().loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Times the samples: mean average precision of each level and of all together, and how often
        a lower level says what the top says.
        """
        if outputs.shape[1] == KNOWN:
            return {}
        features, logits = outputs.split((16 + 32 + 64, len(LEVELS) * KNOWN), dim=1)
        parts = dict(zip(LEVELS, features.split((16, 32, 64), dim=1), strict=True))
        found = {f"map_{name}": precision(z, targets) for name, z in parts.items()}
        *lower, top = (z.argmax(dim=1) for z in logits.split(KNOWN, dim=1))
        agrees = {
            f"agrees_{name}": (said == top).double().sum()
            for name, said in zip(LEVELS, lower, strict=False)
        }
        return {**found, "map_fused": precision(features, targets), **agrees}

    @cached_property
    def _pictures(self) -> tuple[Tensor, Tensor]:
        pixels, labels = pictures(self.params.data)
        scaled = torch.from_numpy(pixels[:, None].astype(np.float32) / 255.0)
        return scaled, torch.from_numpy(labels)


def seen(pixels: Tensor, generator: np.random.Generator) -> Tensor:
    """Each picture at a scale of its own, (n, 1, 28, 28)."""
    out = pixels.clone()
    drawn = generator.integers(0, len(SCALES_SEEN), len(pixels))
    for number, scale in enumerate(SCALES_SEEN):
        chosen = torch.from_numpy(drawn == number)
        if scale < 1 and bool(chosen.any()):
            small = F.interpolate(pixels[chosen], scale_factor=scale, mode="area")
            out[chosen] = F.interpolate(small, size=pixels.shape[2:], mode="bilinear")
    return out


def precision(features: Tensor, targets: Tensor) -> Tensor:
    """Mean over queries of the average precision in the gallery, times the number of samples."""
    asked: Any = targets >= QUERY
    gallery, truth = features[~asked].double(), targets[~asked]
    order = (features[asked].double() @ gallery.T).argsort(dim=1, descending=True, stable=True)
    hits = (truth[order] == (targets[asked] - QUERY)[:, None]).double()
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    average = (hits.cumsum(dim=1) / ranks * hits).sum(dim=1) / hits.sum(dim=1).clamp_min(1)
    return average.mean() * len(targets)
