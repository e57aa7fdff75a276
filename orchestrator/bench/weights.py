"""The task of `farflung bench exchange`: weights that only travel. Each site adds its own constant.

The constant differs from site to site, so that no store that is addressed by content can save
itself a transfer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from farflung import Options, Task

TENSORS = 20


class Weights(Task):
    """Twenty equal tensors, and a step that adds a constant to all of them.

    Nothing is trained: the addition stands in ``forward``, and the loss depends on a single value
    on the side whose gradient is zero.
    """

    class Params(Options):
        """The run's parameters.

        Attributes:
            elements: Values of one of the tensors.
        """

        elements: int = Field(ge=1, le=2**31)

    class Settings(Options):
        """What only this site knows.

        Attributes:
            constant: What it adds.
        """

        constant: float = 0.0

    features: ClassVar[frozenset[str]] = frozenset()
    params: Params
    settings: Settings

    def model(self) -> nn.Module:
        """Random normal weights."""
        return Layers(self.params.elements)

    def train_data(self) -> TensorDataset:
        """One sample, so that all sites weigh the same."""
        return TensorDataset(torch.zeros(1, 1), torch.zeros(1))

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        """Add the constant in place."""
        if not isinstance(model, Layers):
            raise TypeError(f"this task has no {type(model).__name__}")
        with torch.no_grad():
            for layer in model.layers:
                layer.add_(self.settings.constant)
        return model.still * 0.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Zero, with a gradient."""
        return outputs.sum()


class Layers(nn.Module):
    """The weights.

    Args:
        elements: Values of one tensor.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.layers = nn.ParameterList(torch.randn(elements) for _ in range(TENSORS))
        self.still = nn.Parameter(torch.zeros(1))
