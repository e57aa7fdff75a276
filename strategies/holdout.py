"""Scores on labelled data of whoever judges, not of the sites: the orchestrator's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from protos.errors import ConfigInvalid
from strategies import scores
from strategies.context import Refinement
from strategies.task import Task

SPLITS = {"holdout": "val_data", "holdout_test": "test_data"}
"""What the scores of each set of the task are called. As at the sites, only the first one steers."""


def check_holdout(task: Task) -> None:
    """See that a task has data to judge a model by.

    Raises:
        ConfigInvalid: It has none.
    """
    if all(getattr(task, name)() is None for name in SPLITS.values()):
        raise ConfigInvalid(
            "assess.holdout: the orchestrator's own task has neither val_data nor test_data; name "
            "its data in the task's settings there, or leave holdout out"
        )


def holdout(refinement: Refinement, *models: nn.Module) -> list[dict[str, float]]:
    """The scores of some models on `Task.test_data` of the orchestrator's own task.

    For what a strategy makes beside the model. Only reported: nothing is chosen by it. A list of
    empty dictionaries where the task has no test data there.

    Args:
        refinement: Its task has the data and runs the models.
        models: On the refinement's device; evaluation mode is set.
    """
    data = refinement.task.test_data()
    if data is None:
        return [{} for _ in models]
    return [score(refinement.task, model, data, refinement.device) for model in models]


def score(
    task: Task, model: nn.Module, data: Dataset[Any], device: str, batch_size: int = 256
) -> dict[str, float]:
    """The scores of a model on a labelled set, as the sites' sums would give them.

    Args:
        task: Says what samples and outputs mean.
        model: On the device; evaluation mode is set.
        data: Of the task's, with a length.
        device: Where inputs go.
        batch_size: Samples that go through the model at once.
    """
    parts, model = [], model.eval()
    for positions in torch.split(torch.arange(len(data)), batch_size):  # type: ignore[arg-type]
        batch = task.collate([data[i] for i in positions.tolist()])
        inputs, targets = task.unpack(batch)
        if isinstance(inputs, torch.Tensor):
            inputs = inputs.to(device)
        with torch.no_grad():
            outputs = task.forward(model, inputs).float().cpu()
        parts.append(scores.sums_of(task, outputs, targets))
    return scores.pool(parts)
