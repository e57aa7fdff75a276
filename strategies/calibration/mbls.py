"""Margin-based label smoothing: logits may differ, but not by more than a margin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from strategies import scores
from strategies.context import Step
from strategies.protocol import Family, Need, Strategy


class MbLS(Strategy):
    """A linear penalty on logits that lie further below the highest one than a margin.

    With f the logits of a sample, M the margin::

        loss + weight * mean over samples i and classes j of  max(0, max_k f_ik - f_ij - M)

    Label smoothing pulls all distances to zero; here those within the
    margin are free. Outputs (n, classes, …) may have further dimensions: positions are samples, and
    a classifier's with a negative target are left out.

    Degenerate case: ``weight = 0`` adds nothing.

    Departures: none of the objective. The weight stays the same; the paper's code can let it grow
    with the epochs.

    Attributes:
        weight: Of the penalty, >= 0.
        margin: M, >= 0, in logits; the paper has 10, and 6 for CIFAR-10.
    """

    name: ClassVar[str] = "mbls"
    family: ClassVar[Family] = "calibration"
    summary: ClassVar[str] = "A penalty on logits that are further apart than a margin."
    paper: ClassVar[str] = (
        "Liu, Ben Ayed, Galdran, Dolz: The Devil is in the Margin: Margin-based Label Smoothing "
        "for Network Calibration, CVPR 2022, arXiv:2111.15430"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"weight": 0.0}

    weight: float = Field(0.1, ge=0)
    margin: float = Field(10.0, ge=0)

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add the penalty."""
        if self.weight == 0:
            return loss
        logits = scores.rows(step.task, step.outputs, step.targets)
        distance = logits.max(dim=1, keepdim=True).values - logits
        return loss + self.weight * F.relu(distance - self.margin).mean()
