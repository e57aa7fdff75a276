"""A small task and a step of it, for what learns from a teacher while a site trains."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from protos.plan import Plan, Schedule, StrategyChoice, TaskChoice, Work
from strategies.context import Step
from strategies.task import Task


class Deep(Task):
    """Pictures through two convolutions, with tensors of known names."""

    embedding = "4"

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


def step_of(name: str, model: nn.Module, number: int = 2, **params: Any) -> Step:
    """A step of eight pictures, with one strategy in the plan."""
    torch.manual_seed(3)
    plan = Plan(
        run="r",
        round=number,
        attempt=1,
        site="north",
        task=TaskChoice(name="t"),
        stack=(StrategyChoice(name=name, params=params),),
        work=Work(epochs=1),
        schedule=Schedule(lr=0.1),
    )
    base = {key: value.detach().clone() + 0.1 for key, value in model.state_dict().items()}

    def base_model() -> nn.Module:
        teacher = copy.deepcopy(model)
        teacher.load_state_dict(base)
        return teacher

    return Step(
        plan=plan,
        task=Deep(),
        model=model.train(),
        base=base,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        index=0,
        total=4,
        epoch=0,
        learning_rate=0.1,
        generator=torch.Generator(),
        inputs=torch.randn(8, 1, 8, 8),
        targets=torch.arange(8) % 3,
        base_model_factory=base_model,
    )


def went(strategy: Any, step: Step, state: dict[str, Tensor] | None = None) -> Tensor:
    """The loss after batch, forward and objective."""
    strategy.batch(step)
    step.outputs = step.task.forward(step.model, step.inputs)
    loss = step.task.loss(step.outputs, step.targets)
    return strategy.objective(loss, step, state or {})  # type: ignore[no-any-return]


def built(strategy: Any, task: Task | None = None) -> nn.Module:
    """A model of the task as a strategy changes it."""
    torch.manual_seed(0)
    task = task or Deep()
    return strategy.build(task.model(), task)  # type: ignore[no-any-return]
