"""FedProx: a spring that ties local training to the base of the round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from strategies.context import Step
from strategies.protocol import Family, Need, Strategy


class FedProx(Strategy):
    """A proximal term in the local loss.

    With w the local parameters and x the base of the round::

        loss + mu / 2 * ||w - x||^2

    The norm is squared and runs over all shared parameters that are trained; statistics, and
    tensors that stay at the site, are left out.

    Degenerate case: ``mu = 0`` adds nothing.

    Departures: none of the objective. The paper also lets sites work less (inexact solutions);
    here that is the plan's business.

    Attributes:
        mu: Stiffness, >= 0. Try 0.001, 0.01, 0.1, 1. The term's gradient is mu * (w - x), so
            ``lr * mu`` must stay well below 2.
    """

    name: ClassVar[str] = "fedprox"
    family: ClassVar[Family] = "local"
    summary: ClassVar[str] = "A squared distance to the round's base in the local loss."
    paper: ClassVar[str] = (
        "Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith: Federated Optimization in Heterogeneous "
        "Networks, MLSys 2020, arXiv:1812.06127"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"mu": 0.0}

    mu: float = Field(0.01, ge=0)

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add the proximal term."""
        if self.mu == 0:
            return loss
        squares = [
            torch.sum((parameter - step.base[name]) ** 2)
            for name, parameter in step.model.named_parameters()
            if parameter.requires_grad and name in step.base
        ]
        if not squares:
            return loss
        return loss + 0.5 * self.mu * torch.stack(squares).sum()
