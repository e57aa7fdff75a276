"""Mixup: training on blends of two samples, with both their labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from strategies.augmentation.mixing import Mixture, draw
from strategies.context import Step
from strategies.protocol import Family, Need, Strategy


class Mixup(Strategy):
    """Training on convex combinations of the samples of a batch.

    With pi a permutation of the batch and lambda ~ Beta(alpha, alpha), one of each a step::

        x~ = lambda * x + (1 - lambda) * x_pi
        loss = lambda * L(f(x~), y) + (1 - lambda) * L(f(x~), y_pi)

    L is the task's own loss, so any task will do whose inputs are floating-point tensors (batch, …)
    and whose targets are tensors (batch, …). For cross-entropy this is the loss against the blended
    labels, to which it is linear.

    Nothing that reads labels while it trains can stand beside it: a blend has two.

    Degenerate case: ``alpha = 0`` blends nothing.

    Departures: the partners come from the same batch, as in the authors' code.

    Attributes:
        alpha: Of the Beta distribution, >= 0. The paper has 1 for CIFAR-10 and 0.1 to 0.4 for
            ImageNet; the larger, the more even the blends.
    """

    name: ClassVar[str] = "mixup"
    family: ClassVar[Family] = "augmentation"
    summary: ClassVar[str] = "Trains on blends of two samples, with both their labels."
    paper: ClassVar[str] = (
        "Zhang, Cissé, Dauphin, Lopez-Paz: mixup: Beyond Empirical Risk Minimization, ICLR 2018, "
        "arXiv:1710.09412"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}
    blends_labels: ClassVar[bool] = True

    alpha: float = Field(0.2, ge=0)

    def batch(self, step: Step) -> None:
        """Blend the inputs; the targets stay those of the first of both."""
        if self.alpha == 0:
            return
        mixture = draw(self.name, self.alpha, step)
        step.inputs = mixture.of(step.inputs)
        step.scratch[self.name] = mixture

    def loss(self, step: Step) -> Tensor:
        """The task's loss against both targets."""
        if self.alpha == 0:
            return step.task.loss(step.outputs, step.targets)
        mixture: Mixture = step.scratch[self.name]
        first = step.task.loss(step.outputs, step.targets)
        second = step.task.loss(step.outputs, step.targets[mixture.partner.to(step.targets.device)])
        return mixture.share * first + (1 - mixture.share) * second
