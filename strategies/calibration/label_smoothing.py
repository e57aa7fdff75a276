"""Label smoothing: a target that is not quite certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from strategies import scores
from strategies.context import Step
from strategies.protocol import Family, Need, Strategy


class LabelSmoothing(Strategy):
    """Cross-entropy against labels of which a part is spread over all classes.

    With p the softmax of a sample's logits, y its class, C classes::

        loss = (1 - alpha) * (-log p_y) + alpha * (1 / C) * sum_c (-log p_c)

    mean over the samples (section 7 of the paper). It smooths every sample alike, so a model that
    was not over-confident becomes under-confident: it is here as a method of its own and as what
    ``acls`` and ``mbls`` are compared with.

    It takes the place of the task's loss. Outputs (n, classes, …) may have further dimensions:
    positions are samples, and those with a negative target are left out.

    Degenerate case: ``alpha = 0`` is the task's own loss.

    Departures: none of the formula. Class weights that the task's own loss may have are lost.

    Attributes:
        alpha: Part of the target that is spread, in [0, 1). The paper has 0.1; 0.05 is the control
            of ACLS.
    """

    name: ClassVar[str] = "label_smoothing"
    family: ClassVar[Family] = "calibration"
    summary: ClassVar[str] = "Cross-entropy with a part of the label spread over all classes."
    paper: ClassVar[str] = (
        "Szegedy, Vanhoucke, Ioffe, Shlens, Wojna: Rethinking the Inception Architecture for "
        "Computer Vision, CVPR 2016, arXiv:1512.00567"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}

    alpha: float = Field(0.05, ge=0, lt=1)

    def loss(self, step: Step) -> Tensor:
        """The smoothed cross-entropy."""
        if self.alpha == 0:
            return step.task.loss(step.outputs, step.targets)
        logits, truth = scores.flatten(step.outputs, step.targets)
        return F.cross_entropy(logits, truth, label_smoothing=self.alpha)
