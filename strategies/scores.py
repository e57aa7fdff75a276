"""Evaluation as sums: what sites send, so that pooled scores are those of the union of the data.

Every statistic is a sum over samples in float64. Sums of parts of a data set, added, are the sums
of the whole, so accuracy, negative log-likelihood, Brier score and expected calibration error of
the pooled sums are exactly those of the union: no mean of means, no mean of local calibration errors.

With p = softmax(z) of a sample with logits z and class y, and conf = max p:

    nll    -log p_y                       brier  sum over classes of (p_c - [c = y])^2
    ece    sum over bins of |sum of conf - number correct| / n
    classwise_ece    mean over classes c of  sum over bins of |sum of p_c - number of class c| / n,
                     a sample's bin being that of its p_c
    aece   as ece, with bins of equal mass

The bins are 15 of equal width over (0, 1], each open below and closed above: (lo, hi].

Bins of equal mass can't be agreed on before the samples are seen, so ``aece`` is read from 1,000
narrow bins of equal width: where an edge falls inside of one, its samples are divided in proportion,
as if they were alike. Measured against sorted samples, worst of 24 sets of logits each: 0.10 points
off at 3,000 samples and above, 0.4 at 400, where one sample is 0.25. Sums of the narrow bins travel in fp32
(`narrowed`), 8 KB a set. The reference of Park et al. (2023) leaves the sample with the smallest
confidence out of every bin; here it is in the first.

Sums of class-wise gaps are classes x 15 doubles, so with more than 100 classes they are left out,
and the score with them.
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
FINE = 1000
CLASSWISE = 100
"""Up to so many classes the class-wise gaps are summed: 12 KB."""

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
        n, correct, nll, brier: scalars; bins: (3, 15), rows count, sum of confidence, number correct;
        fine: (2, 1000), rows count, sum of confidence - number correct; classwise: (classes, 15),
        sum of p_c - number of class c, with at most 100 classes.
    """
    logits, truth = flatten(outputs.detach(), targets)
    log_p = torch.log_softmax(logits.to(torch.float64), dim=1)
    p = log_p.exp()
    confidence, predicted = p.max(dim=1)
    correct = (predicted == truth).to(torch.float64)
    own = p.gather(1, truth[:, None]).squeeze(1)
    out = {
        "n": torch.tensor(float(len(truth)), dtype=torch.float64),
        "correct": correct.sum(),
        "nll": -log_p.gather(1, truth[:, None]).sum(),
        # sum (p - onehot)^2 = sum p^2 - 2 p_y + 1
        "brier": (p.square().sum(dim=1) - 2 * own + 1).sum(),
        "bins": binned(confidence, correct),
        "fine": finely(confidence, correct),
    }
    if p.shape[1] <= CLASSWISE:
        out["classwise"] = by_class(p, truth)
    return out


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


def fine_bin(confidence: Tensor) -> Tensor:
    """Which of the 1,000 narrow bins (k / 1000, (k + 1) / 1000] a confidence is in, int64."""
    return ((confidence.double() * FINE).ceil().long() - 1).clamp(0, FINE - 1)


def finely(confidence: Tensor, correct: Tensor) -> Tensor:
    """Per narrow bin the count and the sum of confidence - correct, (2, 1000) float64."""
    rows = torch.stack([torch.ones_like(confidence), confidence - correct]).to(torch.float64)
    out = torch.zeros(2, FINE, dtype=torch.float64, device=confidence.device)
    return out.index_add_(1, fine_bin(confidence), rows)


def by_class(p: Tensor, truth: Tensor) -> Tensor:
    """Per class and bin of its probability the sum of p_c - [c = y], (classes, 15) float64."""
    classes = p.shape[1]
    edges = EDGES.to(p.device)
    index = torch.bucketize(p, edges[1:-1].contiguous())
    index += BINS * torch.arange(classes, device=p.device)
    gap = p.clone()
    gap.scatter_add_(1, truth[:, None], torch.full_like(gap[:, :1], -1.0))
    out = torch.zeros(classes * BINS, dtype=torch.float64, device=p.device)
    return out.index_add_(0, index.flatten(), gap.flatten()).reshape(classes, BINS)


def narrowed(sums: Mapping[str, Tensor]) -> Sums:
    """What is sent of a set's sums: the narrow bins in fp32, which is more than they are used to."""
    return {name: v.float() if name == "fine" else v for name, v in sums.items()}


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
    """Scores of pooled sums: accuracy, nll, brier, ece, aece, classwise_ece, loss, the task's metrics.

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
    if "fine" in pooled:
        out["aece"] = float(equal_mass(pooled["fine"]).abs().sum()) / n
    if "classwise" in pooled:
        gaps = pooled["classwise"]
        out["classwise_ece"] = float(gaps.abs().sum()) / (n * len(gaps))
    for name, value in pooled.items():
        if name.startswith(METRIC):
            out[name.removeprefix(METRIC)] = float(value) / n
    return out


def equal_mass(fine: Tensor) -> Tensor:
    """Sums of confidence - correct in 15 bins of equal mass, (15,) float64, from narrow bins.

    Args:
        fine: (2, n) of counts and gaps. Counts below zero, which noise makes, count as none.
    """
    count, gap = fine.double()
    kept = count > 0
    if not kept.any():
        return torch.zeros(BINS, dtype=torch.float64)
    mass, total = count[kept].cumsum(0), gap[kept].cumsum(0)
    zero = torch.zeros(1, dtype=torch.float64)
    mass, total = torch.cat([zero, mass]), torch.cat([zero, total])
    edges = mass[-1] * EDGES
    above = torch.searchsorted(mass, edges).clamp(1, len(mass) - 1)
    share = (edges - mass[above - 1]) / (mass[above] - mass[above - 1])
    at = total[above - 1] + share * (total[above] - total[above - 1])
    return at.diff()


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
