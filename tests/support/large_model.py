"""A task whose model has everything that a file format or a reader with 32-bit sizes trips over."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from farflung import Options, Task

STEP = 0.5


class Large(Task):
    """Training adds `STEP` to every parameter, and counts."""

    class Params(Options):
        """Typed parameters of the run.

        Attributes:
            elements: Of the one large tensor.
        """

        elements: int

    features: ClassVar[frozenset[str]] = frozenset()
    params: Params

    def model(self) -> nn.Module:
        return LargeModel(self.params.elements)

    def train_data(self) -> TensorDataset:
        return TensorDataset(torch.zeros(1, 1), torch.zeros(1))

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        assert isinstance(model, LargeModel)
        return model.train_once()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.sum()


class LargeModel(nn.Module):
    def __init__(self, elements: int) -> None:
        super().__init__()
        self.large = nn.Parameter(torch.zeros(elements))
        self.tied = self.large
        self.narrow = nn.Parameter(torch.ones(3, 5, dtype=torch.bfloat16))
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.nothing = nn.Parameter(torch.zeros(0, 7))
        self.still = nn.Parameter(torch.zeros(1))
        for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float64"):
            self.register_buffer(f"mean_{dtype}", torch.ones(4).to(getattr(torch, dtype)))
        self.register_buffer("steps", torch.tensor(2**40))
        self.register_buffer("small", torch.tensor([1, 2], dtype=torch.int8))
        self.register_buffer("seen", torch.zeros(3, dtype=torch.bool))

    @torch.no_grad()
    def _train(self) -> None:
        for name, parameter in self.named_parameters():
            if name != "still":
                parameter.add_(STEP)
        for name, buffer in self.named_buffers():
            if name.startswith("mean_"):
                buffer.copy_(torch.full((4,), 2.0))
        self.steps += 1
        self.small += 1
        self.seen |= torch.tensor([True, False, True])

    def train_once(self) -> Tensor:
        self._train()
        return self.still * 0.0
