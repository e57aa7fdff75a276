"""Digits in two steps: a model that knows five of ten, and sites that meet three more.

Labels are 0 for "background" and d + 1 for digit d. The model of the task was trained, when it is
made, on the digits 0 to 4, with 8 and 9 as background. In the sites' data the digits 5 to 7 are
labelled, and everything else, the digits that the model knows among them, is background. Test
labels are the truth, of the digits 0 to 7. No set shares a picture with another.
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

from benchmarks.tasks.pictures import Data, small_pictures
from farflung import Options, Task

OLD, NEW = range(5), range(5, 8)
EPOCHS, BATCH = 60, 32


class ARRIVALS(Task):
    """scikit-learn's digits, 8 x 8, and a perceptron with one hidden layer."""

    class Params(Options):
        """The run's parameters.

        Attributes:
            seed: Of the division, and of the model that knows the old digits.
            hidden: Width of the hidden layer.
            data: Clothes may take the digits' place.
        """

        seed: int = Field(0, ge=0, lt=2**32)
        hidden: int = Field(64, ge=1)
        data: Data = "digits"

    class Settings(Options):
        """This site's part.

        Attributes:
            part: From 0 to parts - 1.
            parts: Of how many.
            meets: Whether it meets the new digits at all.
        """

        part: int = Field(0, ge=0)
        parts: int = Field(3, ge=1)
        meets: bool = True

    params: Params
    settings: Settings

    def model(self) -> nn.Module:
        model = nn.Sequential(
            nn.Linear(64, self.params.hidden),
            nn.ReLU(),
            nn.Linear(self.params.hidden, 1 + len(OLD)),
        )
        model.load_state_dict(self._knowing)
        return model

    def train_data(self) -> TensorDataset:
        pixels, digits = self._part(1)
        mine = np.array_split(np.arange(len(digits)), self.settings.parts)[self.settings.part]
        pixels, digits = pixels[mine], digits[mine]
        new = (digits >= NEW.start) & (digits < NEW.stop)
        kept = ~new if not self.settings.meets else torch.ones_like(new)
        labels = torch.where(new, digits + 1, 0)
        return TensorDataset(pixels[kept], labels[kept])

    def test_data(self) -> TensorDataset:
        pixels, digits = self._part(2)
        seen = digits < NEW.stop
        return TensorDataset(pixels[seen], digits[seen] + 1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """How many samples are of old digits, and how many of old and of new ones are right."""
        old = (targets > 0) & (targets <= len(OLD))
        right = outputs.argmax(dim=1) == targets
        return {
            "old": old.sum(),
            "old_right": (right & old).sum(),
            "new_right": (right & ~old).sum(),
        }

    @cached_property
    def _digits(self) -> tuple[Tensor, Tensor]:
        pixels, labels = small_pictures(self.params.data)
        return torch.from_numpy(pixels).flatten(1), torch.from_numpy(labels)

    def _part(self, number: int) -> tuple[Tensor, Tensor]:
        """Samples that taught the old digits (0), those at the sites (1), those for the test (2)."""
        order = np.random.default_rng(self.params.seed).permutation(len(self._digits[1]))
        chosen: NDArray[np.int64] = np.split(order, [600, 1200])[number]
        return self._digits[0][chosen], self._digits[1][chosen]

    @cached_property
    def _knowing(self) -> dict[str, Tensor]:
        """The model that was trained before, the same wherever it is asked for."""
        pixels, digits = self._part(0)
        known = (digits < NEW.start) | (digits >= NEW.stop)
        x, y = pixels[known], torch.where(digits < NEW.start, digits + 1, 0)[known]
        draw = torch.Generator().manual_seed(self.params.seed)
        model = nn.Sequential(
            nn.Linear(64, self.params.hidden),
            nn.ReLU(),
            nn.Linear(self.params.hidden, 1 + len(OLD)),
        )
        for parameter in model.parameters():
            bound = parameter.shape[-1] ** -0.5
            nn.init.uniform_(parameter, -bound, bound, generator=draw)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with torch.enable_grad():
            for _ in range(EPOCHS):
                for rows in torch.randperm(len(x), generator=draw).split(BATCH):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x[rows]), y[rows]).backward()
                    optimizer.step()
        return {name: value.detach() for name, value in model.state_dict().items()}
