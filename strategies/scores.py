"""Evaluation as sums: what sites send, so that pooled scores are those of the union of the data.

Every statistic is a sum over samples in float64. Sums of parts of a data set, added, are the sums
of the whole, so accuracy, negative log-likelihood, Brier score and expected calibration error of
the pooled sums are exactly those of the union: no mean of means, no mean of local calibration errors.

With p = softmax(z) of a sample with logits z and class y, and conf = max p:

    nll    -log p_y                       brier  sum over classes of (p_c - [c = y])^2
    ece    sum over bins of |sum of conf - number correct| / n

The bins are 15 of equal width over (0, 1], each open below and closed above: (lo, hi].
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from strategies.task import Task

BINS = 15
EDGES = torch.linspace(0.0, 1.0, BINS + 1, dtype=torch.float64)

Sums = dict[str, Tensor]
"""Name to a float64 sum over samples; `add` merges two of them."""

METRIC = "metric."
"""Prefix of the sums of `Task.metrics`."""


class Bin(NamedTuple):
    """One bar of a reliability diagram.

    Attributes:
        low: Lower edge of the confidence, excluded.
        high: Upper edge, included.
        samples: How many have their confidence in it.
        confidence: Their mean confidence; NaN for none.
        accuracy: The share of them that is right; NaN for none.
    """

    low: float
    high: float
    samples: float
    confidence: float
    accuracy: float


def is_classification(task: Task) -> bool:
    """Whether a task's outputs are logits and its targets class indices."""
    return "classification" in task.features


def flatten(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (n, classes, …) and targets (n, …) as (samples, classes) and (samples,).

    Positions are samples of their own, and negative targets (ignored positions) are left out.
    Gradients pass.
    """
    classes = outputs.shape[1]
    logits = outputs.movedim(1, -1).reshape(-1, classes)
    flat = targets.reshape(-1)
    kept = flat >= 0
    return logits[kept], flat[kept]


def rows(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Logits (n, classes, …) as (samples, classes) of any task that has them.

    For what reads no labels; still, a classifier's ignored positions are left out.
    """
    if is_classification(task):
        return flatten(outputs, targets)[0]
    return outputs.movedim(1, -1).reshape(-1, outputs.shape[1])


def sums(outputs: Tensor, targets: Tensor) -> Sums:
    """The sums of some samples with logits (n, classes, …) and class indices (n, …).

    Returns:
        n, correct, nll, brier: scalars; bins: (3, 15), rows count, sum of confidence, number correct.
    """
    logits, truth = flatten(outputs.detach(), targets)
    log_p = torch.log_softmax(logits.to(torch.float64), dim=1)
    p = log_p.exp()
    confidence, predicted = p.max(dim=1)
    correct = (predicted == truth).to(torch.float64)
    own = p.gather(1, truth[:, None]).squeeze(1)
    return {
        "n": torch.tensor(float(len(truth)), dtype=torch.float64),
        "correct": correct.sum(),
        "nll": -log_p.gather(1, truth[:, None]).sum(),
        # sum (p - onehot)^2 = sum p^2 - 2 p_y + 1
        "brier": (p.square().sum(dim=1) - 2 * own + 1).sum(),
        "bins": binned(confidence, correct),
    }


def binned(confidence: Tensor, correct: Tensor) -> Tensor:
    """Per bin the count, the sum of the confidence and the number correct, (3, 15) float64.

    Args:
        confidence: (n,) in (0, 1].
        correct: (n,) of zeros and ones.
    """
    edges = EDGES.to(confidence.device)
    # An edge belongs to the bin below it, as in (lo, hi].
    index = torch.bucketize(confidence.to(torch.float64), edges[1:-1].contiguous())
    rows = torch.stack([torch.ones_like(confidence), confidence, correct]).to(torch.float64)
    out = torch.zeros(3, BINS, dtype=torch.float64, device=confidence.device)
    return out.index_add_(1, index, rows)


def sums_of(task: Task, outputs: Any, targets: Any) -> Sums:
    """The sums of a batch of any task: n, loss, its own metrics, and `sums` of classifiers.

    ``loss`` is the task's mean loss of the batch times its samples.
    """
    if is_classification(task):
        out = sums(outputs, targets)
        samples = float(out["n"])
    else:
        out = {}
        samples = float(len(targets))
    out["n"] = torch.tensor(samples, dtype=torch.float64)
    loss = task.loss(outputs, targets).detach().to("cpu", torch.float64)
    out["loss"] = loss * samples if samples else torch.zeros((), dtype=torch.float64)
    for name, value in task.metrics(outputs, targets).items():
        out[METRIC + name] = value.detach().to(torch.float64)
    return {name: value.to("cpu") for name, value in out.items()}


def add(*parts: Mapping[str, Tensor]) -> Sums:
    """The sums of the union of disjoint parts; a name that a part lacks counts as zero there."""
    out: Sums = {}
    for part in parts:
        for name, value in part.items():
            out[name] = value.clone() if name not in out else out[name] + value
    return out


def scores(pooled: Mapping[str, Tensor]) -> dict[str, float]:
    """Scores of pooled sums: accuracy, nll, brier, ece, loss, and the task's metrics by name.

    What the sums do not hold is left out; without samples the result is empty.
    """
    n = float(pooled["n"]) if "n" in pooled else 0.0
    if n <= 0:
        return {}
    out = {}
    if "correct" in pooled:
        out["accuracy"] = float(pooled["correct"]) / n
    for name in ("nll", "brier", "loss"):
        if name in pooled:
            out[name] = float(pooled[name]) / n
    if "bins" in pooled:
        _, confidence, correct = pooled["bins"]
        out["ece"] = float((confidence - correct).abs().sum()) / n
    for name, value in pooled.items():
        if name.startswith(METRIC):
            out[name.removeprefix(METRIC)] = float(value) / n
    return out


def reliability(pooled: Mapping[str, Tensor]) -> list[Bin]:
    """The reliability diagram of pooled sums; empty if they hold no bins."""
    if "bins" not in pooled:
        return []
    edges = EDGES.tolist()
    out = []
    for k, (count, confidence, correct) in enumerate(pooled["bins"].T.tolist()):
        mean = confidence / count if count else math.nan
        accuracy = correct / count if count else math.nan
        out.append(Bin(edges[k], edges[k + 1], count, mean, accuracy))
    return out


def pool(per_site: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """The scores of the union of several sites' data from their sums."""
    return scores(add(*per_site))
