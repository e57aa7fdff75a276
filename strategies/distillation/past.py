"""Models of earlier rounds as teachers: kept at the site as state, asked once a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from strategies.context import Step


def kept(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of a base that outlives the round's file."""
    return {name: value.detach().clone() for name, value in base.items()}


def outputs_of(tensors: Mapping[str, Tensor], step: Step, key: str) -> Any:
    """Outputs for this batch of a model that holds ``tensors``: evaluation mode, no gradient.

    Args:
        tensors: Shared tensors by name. What they do not name is as at the start of the round:
            the site's own tensors among it.
        step: The step.
        key: Under which the model lives in the step's scratch; made once a round.
    """
    if key not in step.scratch:
        if step.base_model_factory is None:
            raise LookupError("this step has no base model")
        model = step.base_model_factory()
        model.load_state_dict(dict(tensors), strict=False)
        step.scratch[key] = model.eval().requires_grad_(False)
    with torch.no_grad():
        return step.task.forward(cast(nn.Module, step.scratch[key]), step.inputs)
