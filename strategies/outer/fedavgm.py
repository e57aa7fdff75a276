"""FedAvgM: momentum on the shared model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from protos.manifest import Tile
from strategies.context import Moment
from strategies.protocol import Family, Strategy


class FedAvgM(Strategy):
    """Server momentum: the mean update is a gradient, and SGD with momentum follows it.

    With g the reduced update (base - mean of the sites), v the velocity (0 at the start), x the
    shared model::

        v <- momentum * v + g
        x <- x - learning_rate * v                          nesterov = false
        x <- x - learning_rate * (g + momentum * v)         nesterov = true

    Parameters only. The velocity is fp32; a step is computed in fp64 and rounded once.

    Degenerate case: ``momentum = 0, learning_rate = 1`` is the plain average.

    Departures: none from the first form. The second is torch's form of Nesterov's momentum, the
    outer optimizer of DiLoCo (there with momentum 0.9 and learning rate 0.7).

    Attributes:
        momentum: In [0, 1). In the long run a velocity is 1 / (1 - momentum) updates long: with
            0.9 and a learning rate of 1 expect overshooting where sites move far in a round.
        learning_rate: Outer learning rate, > 0.
        nesterov: Whether to look ahead.
    """

    name: ClassVar[str] = "fedavgm"
    family: ClassVar[Family] = "outer"
    summary: ClassVar[str] = "Momentum on the shared model; DiLoCo's outer step with nesterov."
    paper: ClassVar[str] = (
        "Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated "
        "Visual Classification, 2019, arXiv:1909.06335"
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"momentum": 0.0, "learning_rate": 1.0}

    momentum: float = Field(0.9, ge=0, lt=1)
    learning_rate: float = Field(1.0, gt=0)
    nesterov: bool = False

    def init_state(self, tile: Tile) -> dict[str, Tensor]:
        """The velocity, fp32 zeros."""
        return {"velocity": torch.zeros(tile.elements)}

    def step(
        self, delta: Tensor, base: Tensor, state: dict[str, Tensor], tile: Tile, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Follow the velocity."""
        gradient = delta.to(torch.float64)
        velocity = self.momentum * state["velocity"].to(torch.float64) + gradient
        direction = gradient + self.momentum * velocity if self.nesterov else velocity
        step = (self.learning_rate * direction).to(delta.dtype)
        return step, {"velocity": velocity.to(torch.float32)}
