"""The optimizer of a round at a site, and its state where the plan keeps it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from protos.errors import TaskFailed
from protos.plan import OptimizerChoice

SEPARATOR = "::"
"""Between a parameter's name and the name of its state."""


def make_optimizer(choice: OptimizerChoice, model: nn.Module, lr: float) -> Optimizer:
    """A fresh optimizer over everything that requires a gradient.

    Raises:
        TaskFailed: Nothing does.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise TaskFailed("the model has no parameter that requires a gradient")
    match choice.name:
        case "sgd":
            return torch.optim.SGD(
                parameters,
                lr=lr,
                momentum=choice.momentum,
                nesterov=choice.nesterov,
                weight_decay=choice.weight_decay,
            )
        case "adam":
            return torch.optim.Adam(
                parameters, lr=lr, betas=choice.betas, weight_decay=choice.weight_decay
            )
        case "adamw":
            return torch.optim.AdamW(
                parameters, lr=lr, betas=choice.betas, weight_decay=choice.weight_decay
            )


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def saved(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state as named tensors."""
    out = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                out[f"{name}{SEPARATOR}{key}"] = torch.as_tensor(value).detach().cpu().clone()
    return out


def restore(optimizer: Optimizer, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give an optimizer the state that ``saved`` made; what doesn't fit is left fresh."""
    parameters = dict(model.named_parameters())
    for label, value in state.items():
        name, key = label.rsplit(SEPARATOR, 1)
        parameter = parameters.get(name)
        if parameter is None or (value.dim() and value.shape != parameter.shape):
            continue
        # Step counts stay on the CPU, as torch keeps them.
        where = parameter.device if value.dim() else torch.device("cpu")
        optimizer.state[parameter][key] = value.clone().to(where)
