"""Focal loss: what is classified rightly and with confidence counts for little."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from strategies import scores
from strategies.context import Step
from strategies.protocol import Family, Need, Strategy


class Focal(Strategy):
    """Cross-entropy weighted by how far a sample is from being classified with certainty.

    With p the softmax of a sample's logits and y its class::

        loss = (1 - p_y)^gamma * (-log p_y)

    mean over the samples. It is an upper bound of KL(label || p) - gamma * H(p): what lowers it
    raises the entropy H of the predictions, and so keeps confidence down (Mukhoti et al.).

    It takes the place of the task's loss. Outputs (n, classes, …) may have further dimensions:
    positions are samples, and those with a negative target are left out.

    Degenerate case: ``gamma = 0`` is the task's own loss.

    Departures: no weight per class (alpha of Lin et al.), and gamma is the same for all samples
    (FLSD-53 of Mukhoti et al. is not here).

    Attributes:
        gamma: >= 0. Lin et al. use 2 for detection, Mukhoti et al. 3 for calibration.
    """

    name: ClassVar[str] = "focal"
    family: ClassVar[Family] = "calibration"
    summary: ClassVar[str] = "Focal loss: samples that are certain already count for little."
    paper: ClassVar[str] = (
        "Lin, Goyal, Girshick, He, Dollár: Focal Loss for Dense Object Detection, ICCV 2017, "
        "arXiv:1708.02002; Mukhoti, Kulharia, Sanyal, Golodetz, Torr, Dokania: Calibrating Deep "
        "Neural Networks using Focal Loss, NeurIPS 2020, arXiv:2002.09437"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"gamma": 0.0}

    gamma: float = Field(3.0, ge=0, le=20)

    def loss(self, step: Step) -> Tensor:
        """The weighted cross-entropy."""
        if self.gamma == 0:
            return step.task.loss(step.outputs, step.targets)
        logits, truth = scores.flatten(step.outputs, step.targets)
        log_p = F.log_softmax(logits, dim=1).gather(1, truth[:, None]).squeeze(1)
        # 1 - p without cancellation. At 0, a gamma below 1 would have an infinite slope.
        doubt = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
        return -(doubt**self.gamma * log_p).mean()
