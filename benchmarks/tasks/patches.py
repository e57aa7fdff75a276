"""Grey patches of ten photographs and textures that come with scikit-image.

The class of a patch is the picture that it was cut from; training patches come from the left half,
validation and test patches from the right one, so no set shares a pixel with the training set.
Unlike digits, most of these look the same in a mirror.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.tasks.pictures import Cut, clothes
from farflung import Options, Task

PICTURES = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png",
    "gravel.png", "rocket.jpg", "hubble_deep_field.jpg", "retina.jpg",
)  # fmt: skip
SIDE = 16


class PATCHES(Task):
    """Patches of 16 x 16 and a small convolutional network with group normalisation."""

    embedding = "7"
    input_shape = (1, SIDE, SIDE)

    class Params(Options):
        """The run's parameters.

        Attributes:
            seed: Of the patches that are cut.
            train: Training patches of each class at a site that has it.
            test: Test patches of each class, the same at every site.
            width: Channels.
            data: Clothes, in means of 2 x 2 with a border, may take the place of the patches.
        """

        seed: int = Field(0, ge=0, lt=2**32)
        train: int = Field(100, ge=1)
        test: int = Field(100, ge=1)
        width: int = Field(16, ge=4)
        data: Cut = "photographs"

    class Settings(Options):
        """This site's part.

        Attributes:
            part: Its number: each part has patches of its own.
            parts: Of how many that share the classes out: part k has the classes k, k + parts, ….
        """

        part: int = Field(0, ge=0)
        parts: int = Field(1, ge=1, le=len(PICTURES))

    params: Params
    settings: Settings

    def model(self) -> nn.Module:
        width = self.params.width
        return nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(width * (SIDE // 4) ** 2, len(PICTURES)),
        )  # fmt: skip

    def train_data(self) -> TensorDataset:
        return self._patches("train", self.params.train, self.settings.part, self.classes)

    def val_data(self) -> TensorDataset:
        return self._patches("val", 20, self.settings.part, self.classes)

    def test_data(self) -> TensorDataset:
        return self._patches("test", self.params.test, 0, range(len(PICTURES)))

    @property
    def classes(self) -> range:
        """Those that this site has."""
        return range(self.settings.part % self.settings.parts, len(PICTURES), self.settings.parts)

    def _patches(self, which: str, count: int, part: int, classes: range) -> TensorDataset:
        stream = {"train": 0, "val": 1, "test": 2}[which]
        random = np.random.default_rng([self.params.seed, stream, part])
        if self.params.data == "fashion-mnist":
            return self._clothes("train" if which == "train" else "t10k", count, classes, random)
        inputs: list[NDArray[np.float32]] = []
        for label in classes:
            picture = self._pictures[label]
            middle = picture.shape[1] // 2
            half = picture[:, :middle] if which == "train" else picture[:, middle:]
            rows = random.integers(0, half.shape[0] - SIDE + 1, count)
            columns = random.integers(0, half.shape[1] - SIDE + 1, count)
            inputs += [half[r : r + SIDE, c : c + SIDE] for r, c in zip(rows, columns, strict=True)]
        stacked: Tensor = torch.from_numpy(np.stack(inputs))[:, None]
        labels = torch.tensor(list(classes)).repeat_interleave(count)
        return TensorDataset((stacked - 0.45) / 0.25, labels)

    @staticmethod
    def _clothes(
        half: Literal["train", "t10k"], count: int, classes: range, random: np.random.Generator
    ) -> TensorDataset:
        wanted = np.repeat(np.array(classes), count)
        whole = torch.from_numpy(clothes(half, wanted, random))[:, None]
        small = F.pad(F.avg_pool2d(whole, 2), (1, 1, 1, 1))
        return TensorDataset((small - 0.45) / 0.25, torch.from_numpy(wanted))

    @cached_property
    def _pictures(self) -> list[NDArray[np.float32]]:
        from skimage import data
        from skimage.color import rgb2gray
        from skimage.io import imread

        found = [imread(f"{data.data_dir}/{name}") for name in PICTURES]
        grey = [rgb2gray(p[..., :3]) if p.ndim == 3 else p / 255.0 for p in found]
        return [p.astype(np.float32) for p in grey]


def controls(seed: int, data: Cut = "photographs") -> dict[str, dict[str, float]]:
    """Newcomers that learn from as many real patches as the sites condense."""
    from strategies.condensation.fyi import ROW, learn
    from strategies.context import seeded

    out = {}
    for per_class in (1, 5):
        chosen = []
        for site in ROW.sites:
            task = PATCHES(PATCHES.Params(seed=seed, data=data), PATCHES.Settings(**site.settings))
            inputs, targets = task.train_data().tensors
            generator = seeded(seed, "real", site.name)
            for label in task.classes:
                rows = torch.nonzero(targets == label).flatten()
                drawn = rows[torch.randperm(len(rows), generator=generator)[:per_class]]
                chosen.append((inputs[drawn], targets[drawn]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = task.model()
        how = ROW.arms[f"fyi-{per_class}"]["strategy"][0]
        learn(
            task,
            model,
            torch.cat([inputs for inputs, _ in chosen]),
            torch.cat([targets for _, targets in chosen]),
            flip=True,
            steps=how["steps"],
            learning_rate=how["learning_rate"],
            generator=seeded(seed, "real"),
        )
        unseen, truth = task.test_data().tensors
        with torch.no_grad():
            right = (model(unseen).argmax(dim=1) == truth).double().mean()
        out[f"real-{per_class}"] = {"test.accuracy": float(right)}
    return out
