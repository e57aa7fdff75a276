"""Self-distillation: the shared model of the last rounds teaches every site during the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from protos.plan import Plan
from strategies.context import Step
from strategies.distillation.past import kept, outputs_of
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

    With ``memory`` m > 0 the teacher is a running mean of the bases that the site has seen, so that
    no single round decides (statistics alike; counters are those of the last base)::

        teacher_r = m * teacher_(r-1) + (1 - m) * base_r

    The mean lives at the site and never leaves it. m = 0 keeps nothing.

    Degenerate case: ``weight = 0`` adds nothing.

    Departures: SRDL (``srdl``) freezes the first half of one training as the teacher of the second;
    here every round has its own teacher, and weights are always kept. T^2 as weight of the
    divergence is a recollection, like T. The running mean is ours.

    Attributes:
        weight: Of the divergence, >= 0.
        temperature: T, > 0.
        start: First round with a teacher, >= 1; use 1 where the run starts from a trained model.
        ramp: Rounds from ``start`` until the full weight, >= 1; 1 has it at once.
        memory: m, in [0, 1).
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
    memory: float = Field(0.0, ge=0, lt=1)

    def adopt(
        self, base: dict[str, Tensor], state: dict[str, Tensor], plan: Plan
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Move the running mean of the bases, where there is one."""
        if self.weight == 0 or self.memory == 0:
            return base, state
        mean = kept(base)
        for name, value in mean.items():
            if name in state and value.is_floating_point():
                value.lerp_(state[name].to(value), self.memory)
        return base, mean

    def weight_in(self, round_number: int) -> float:
        """The weight of the divergence in a round."""
        taught = round_number - self.start + 1
        return self.weight * min(max(taught, 0) / self.ramp, 1.0)

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add the divergence from the base's predictions."""
        weight = self.weight_in(step.plan.round)
        if weight == 0:
            return loss
        if self.memory:
            teacher = outputs_of(state, step, "self_distillation.teacher")
        else:
            teacher = step.base_outputs()
        return loss + weight * divergence(teacher, step.outputs, self.temperature)
