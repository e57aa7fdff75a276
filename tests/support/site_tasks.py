"""Tasks for tests of the site agent: two clouds of points, and every way to go wrong."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import time
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from farflung import Options, Task, Trained, Training


def clouds(seed: int, count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 2, (count,), generator=generator)
    inputs = torch.randn(count, 4, generator=generator) + 2 * targets[:, None] - 1
    return TensorDataset(inputs, targets)


class Clouds(Task):
    class Params(Options):
        hidden: int = 8
        samples: int = 40
        dropout: float = 0.0
        trouble: Literal[
            "", "raise", "nan", "segfault", "kill", "exit", "memory", "print", "slow"
        ] = ""
        at_step: int = 2

    class Settings(Options):
        seed: int = 1

    params: Params
    settings: Settings

    def model(self) -> nn.Module:
        p = self.params
        return nn.Sequential(
            nn.Linear(4, p.hidden), nn.BatchNorm1d(p.hidden), nn.ReLU(), nn.Dropout(p.dropout),
            nn.Linear(p.hidden, 2),
        )  # fmt: skip

    def train_data(self) -> Dataset[Any]:
        if self.params.trouble == "raise":
            self._fail()
        return clouds(self.settings.seed, self.params.samples)

    def _fail(self) -> None:
        raise ValueError("patient 4711 has no label")

    def val_data(self) -> Dataset[Any]:
        return clouds(100 + self.settings.seed, 30)

    def test_data(self) -> Dataset[Any]:
        return clouds(200, 25)

    _calls = 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(outputs, targets)
        if not outputs.requires_grad:
            return loss
        self._calls += 1
        if self._calls < self.params.at_step:
            return loss
        match self.params.trouble:
            case "nan":
                return loss * float("nan")
            case "segfault":
                ctypes.string_at(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(3)
            case "memory":
                torch.zeros(1 << 40)
            case "print":
                print("progress!", flush=True)
                os.write(1, b'{"event":"done","job":1}\n')
            case "slow":
                time.sleep(0.2)
        return loss


class Frozen(Clouds):
    """A frozen body, known by digest, and a small head."""

    def model(self) -> nn.Module:
        model = super().model()
        model[0].requires_grad_(False)
        return model


class Unlike(Frozen):
    """The same, but this site's own body has other bits: it has to be fetched."""

    def model(self) -> nn.Module:
        model = super().model()
        with torch.no_grad():
            model[0].weight.add_(1.0)
        return model


class Personal(Clouds):
    """Normalisation stays at the site."""

    def placement(self) -> dict[str, str]:
        return {"1.*": "site"}


class Tied(Clouds):
    """Two layers share one weight."""

    def model(self) -> nn.Module:
        first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        second.weight = first.weight
        return nn.Sequential(first, second, nn.Linear(4, 2))


class Endless(IterableDataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return iter([self.data[i] for i in range(len(self.data))])


class Shaken(Dataset[Any]):
    """Each sample is moved a little, by the generators of torch, numpy and Python."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.data[index]
        noise = torch.randn(4) + float(np.random.standard_normal()) + random.gauss(0.0, 1.0)
        return inputs + 0.1 * noise, target


class Noisy(Clouds):
    def train_data(self) -> Dataset[Any]:
        return Shaken(clouds(self.settings.seed, self.params.samples))


class Streamed(Clouds):
    def train_data(self) -> Dataset[Any]:
        return Endless(clouds(self.settings.seed, self.params.samples))


class OwnLoop(Clouds):
    """Trains with a loop of its own: plain gradient descent over all samples at once."""

    def fit(self, training: Training) -> Trained:
        inputs, targets = training.data.tensors  # type: ignore[attr-defined]
        steps = int(training.plan.work.amount)
        loss = torch.zeros(())
        for step in range(steps):
            loss = self.loss(training.model(inputs), targets)
            gradients = torch.autograd.grad(loss, list(training.model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(training.model.parameters(), gradients, strict=True):
                    parameter -= training.rate(step / steps) * gradient
            training.report(step + 1, float(loss.detach()))
            if training.enough():
                steps = step + 1
                break
        return Trained(len(targets), steps, float(steps), float(loss.detach()))
