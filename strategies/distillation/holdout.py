"""Scores on the orchestrator's own labelled data, for what is made there beside the model."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import Dataset

from strategies import scores
from strategies.context import Refinement


def holdout(
    refinement: Refinement, *models: nn.Module, batch_size: int = 256
) -> list[dict[str, float]]:
    """The scores of some models on `Task.test_data` of the orchestrator's own task.

    Only reported: nothing is chosen by it. A list of empty dictionaries where the task has no test
    data there.

    Args:
        refinement: Its task has the data and runs the models.
        models: On the refinement's device; evaluation mode is set.
        batch_size: Samples that go through a model at once.
    """
    data = refinement.task.test_data()
    if data is None:
        return [{} for _ in models]
    return [_scores(refinement, model.eval(), data, batch_size) for model in models]


def _scores(
    refinement: Refinement, model: nn.Module, data: Dataset[object], batch_size: int
) -> dict[str, float]:
    task, parts = refinement.task, []
    for positions in torch.split(torch.arange(len(data)), batch_size):  # type: ignore[arg-type]
        batch = task.collate([data[i] for i in positions.tolist()])
        inputs, targets = task.unpack(batch)
        if isinstance(inputs, torch.Tensor):
            inputs = inputs.to(refinement.device)
        with torch.no_grad():
            outputs = task.forward(model, inputs).float().cpu()
        parts.append(scores.sums_of(task, outputs, targets))
    return scores.pool(parts)
