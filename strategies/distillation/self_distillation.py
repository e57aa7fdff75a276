"""Self-distillation: the shared model of the last round teaches every site during the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from strategies.context import Step
from strategies.distillation.softened import divergence
from strategies.protocol import Family, Need, Strategy


class SelfDistillation(Strategy):
    """Distillation at the sites from the frozen base of the round.

    With z the logits in training, z* those of the round's base on the same batch (evaluation
    mode, no gradient), T the temperature::

        loss + w * T^2 * KL( softmax(z* / T) || softmax(z / T) )

    The base is the average of all sites, so its predictions carry what the others know about
    classes that are rare here. Nothing is sent for it. It costs one forward pass more a step.

    The base of round 1 is untrained unless the run starts from a model, and a teacher that knows
    nothing only slows things down: w is 0 before round ``start`` and climbs linearly to ``weight``
    over ``ramp`` rounds.

    Degenerate case: ``weight = 0`` adds nothing.

    Departures: SRDL freezes the first half of one training as the teacher of the second, each
    with its own decayed rate, and T = 3; here the halves are rounds, which the cycle of
    co-learning restarts in the same way, and weights are kept ("warm") instead of drawn anew.
    T^2 as weight of the divergence is a recollection, like T.

    Attributes:
        weight: Of the divergence, >= 0.
        temperature: T, > 0.
        start: First round with a teacher, >= 1; use 1 where the run starts from a trained model.
        ramp: Rounds from ``start`` until the full weight, >= 1; 1 has it at once.
    """

    name: ClassVar[str] = "self_distillation"
    family: ClassVar[Family] = "distillation"
    summary: ClassVar[str] = "The round's base model teaches the sites while they train."
    paper: ClassVar[str] = (
        "after Lan, Zhu, Gong: Self-Referenced Deep Learning, ACCV 2018, arXiv:1811.07598"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"weight": 0.0}

    weight: float = Field(0.5, ge=0)
    temperature: float = Field(3.0, gt=0)
    start: int = Field(2, ge=1)
    ramp: int = Field(2, ge=1)

    def weight_in(self, round_number: int) -> float:
        """The weight of the divergence in a round."""
        taught = round_number - self.start + 1
        return self.weight * min(max(taught, 0) / self.ramp, 1.0)

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add the divergence from the base's predictions."""
        weight = self.weight_in(step.plan.round)
        if weight == 0:
            return loss
        return loss + weight * divergence(step.base_outputs(), step.outputs, self.temperature)
