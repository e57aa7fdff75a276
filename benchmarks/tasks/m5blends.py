"""M5 whose test pictures come with a blend each: is a model less certain of a blend, and in order?"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.tasks.m5 import M5

LEVELS = 20
"""Shares of the larger part: 0.5, 0.525, …, 0.975."""
MARGIN = 2.0


class M5BLENDS(M5):
    """As M5, with metrics over the test set.

    A test sample is a picture and its blend with a picture of another class. The blend's target is
    -1 - level: negative, so that it is no sample of any score.

    - ``rank_correlation``: Spearman's between the share of the larger part and the confidence in the
      blend, over the batch.
    - ``above_blend``: part of the pictures whose top logit exceeds that of their blend by 2.
    """

    def test_data(self) -> TensorDataset:
        pictures, labels = super().test_data().tensors
        order = torch.argsort(labels, stable=True)
        partner = torch.empty_like(order)
        partner[order] = order.roll(len(order) // 2)  # no class has half of them
        random = np.random.default_rng([self.params.seed, LEVELS])
        level = torch.from_numpy(random.integers(LEVELS, size=len(labels)))
        share = (0.5 + 0.5 * level / LEVELS)[:, None].to(pictures.dtype)
        blends = share * pictures + (1 - share) * pictures[partner]
        return TensorDataset(
            torch.stack([pictures, blends], dim=1), torch.stack([labels, -1 - level], dim=1)
        )

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        if inputs.dim() == 2:
            return super().forward(model, inputs)  # type: ignore[no-any-return]
        outputs: Tensor = super().forward(model, inputs.flatten(0, 1))
        return outputs.unflatten(0, inputs.shape[:2]).movedim(1, 2)  # (n, classes, 2)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets.clamp(min=-1), ignore_index=-1)

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if targets.dim() == 1:
            return {}
        outputs = outputs.detach().cpu()
        top = outputs.amax(dim=1)
        confidence = outputs.softmax(dim=1).amax(dim=1)[:, 1]
        level: Any = -1 - targets[:, 1].cpu()
        found = float(spearmanr(level.numpy(), confidence.numpy()).statistic)
        return {
            "rank_correlation": torch.tensor(found * len(targets)),
            "above_blend": (top[:, 0] >= top[:, 1] + MARGIN).double().sum(),
        }
