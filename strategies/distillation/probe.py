"""Probes: how much of the labels can be read off frozen embeddings, for `Task.metrics`.

Both give the number of samples that are read right, a sum over samples as `Task.metrics` wants it.
Sums over several batches or sites may be added; each batch is then probed with its own samples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(embeddings: Tensor, targets: Tensor, folds: int = 5, ridge: float = 1e-2) -> Tensor:
    """Samples that a linear classifier reads right which was fitted to the others' labels.

    Sample i belongs to fold i mod ``folds``. For each fold, W minimises, over the samples x
    (standardised, with a constant appended) of the other folds and their one-hot labels y,
    ``mean |x W - y|^2 + ridge * |W|^2``.

    Args:
        embeddings: (n, features).
        targets: (n,) class indices.
        folds: >= 2; fewer samples than folds give 0.
        ridge: > 0.
    """
    if len(targets) < folds:
        return torch.zeros((), dtype=torch.float64)
    x, y = embeddings.detach().double(), F.one_hot(targets).double()
    fold = torch.arange(len(x), device=x.device) % folds
    right = torch.zeros((), dtype=torch.float64, device=x.device)
    for k in range(folds):
        known, asked = x[fold != k], x[fold == k]
        mean, scale = known.mean(dim=0), known.std(dim=0).clamp_min(1e-9)
        known, asked = (F.pad((part - mean) / scale, (0, 1), value=1.0) for part in (known, asked))
        gram = known.T @ known / len(known) + ridge * torch.eye(known.shape[1], device=x.device)
        weights = torch.linalg.solve(gram, known.T @ y[fold != k] / len(known))
        right += ((asked @ weights).argmax(dim=1) == targets[fold == k]).sum()
    return right


def nearest(embeddings: Tensor, targets: Tensor, k: int = 5) -> Tensor:
    """Samples whose k nearest others, by cosine, vote for their class; a tie goes to the lower one.

    Args:
        embeddings: (n, features).
        targets: (n,) class indices.
        k: >= 1.
    """
    z = F.normalize(embeddings.detach().double(), dim=1)
    if len(z) < 2:
        return torch.zeros((), dtype=torch.float64)
    cosine = (z @ z.T).fill_diagonal_(-torch.inf)
    votes = F.one_hot(targets)[cosine.topk(min(k, len(z) - 1), dim=1).indices].sum(dim=1)
    return (votes.argmax(dim=1) == targets).sum().double()
