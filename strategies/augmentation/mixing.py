"""Mixtures: samples of a batch blended with other samples of the same batch."""

from __future__ import annotations

from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protos.errors import TaskFailed
from strategies.context import Step


class Mixture(NamedTuple):
    """How a batch is blended with itself: x = share * x_i + (1 - share) * x_partner(i).

    Attributes:
        share: Part of the sample itself, in [0, 1]; the same for the whole batch.
        partner: Position of each sample's partner, (batch,).
    """

    share: float
    partner: Tensor

    def of(self, inputs: Tensor) -> Tensor:
        """The blended inputs, of the same shape."""
        return self.share * inputs + (1 - self.share) * inputs[self.partner]


def draw(name: str, alpha: float, step: Step) -> Mixture:
    """A share from Beta(alpha, alpha) and a permutation, from the step's generator.

    Args:
        name: The strategy, for the error.
        alpha: > 0.
        step: Its inputs and targets are looked at, not changed.

    Raises:
        TaskFailed: What the task gives can't be blended.
    """
    inputs, targets = (_tensor(name, what, step) for what in ("inputs", "targets"))
    if not inputs.is_floating_point():
        raise _refusal(name, f"its inputs are {inputs.dtype}")
    seed = int(torch.randint(2**62, (), generator=step.generator))
    partner = torch.randperm(len(targets), generator=step.generator)
    share = Random(seed).betavariate(alpha, alpha)  # torch's own takes no generator
    return Mixture(share, partner.to(inputs.device))


def _tensor(name: str, what: str, step: Step) -> Tensor:
    value: Any = getattr(step, what)
    if not isinstance(value, Tensor):
        raise _refusal(name, f"its {what} are a {type(value).__name__}")
    return value


def _refusal(name: str, why: str) -> TaskFailed:
    return TaskFailed(
        f"strategy {name}: it blends samples, which are floating-point tensors (batch, …) with "
        f"targets (batch, …), but of this task {why}; take {name} out of the run",
        strategy=name,
    )
