"""Softened predictions: the loss that distillation methods share."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def rows(logits: Tensor) -> Tensor:
    """Logits (n, classes, …) as (samples, classes): positions are samples of their own."""
    return logits.movedim(1, -1).reshape(-1, logits.shape[1])


def divergence(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T^2 * KL( softmax(teacher / T) || softmax(student / T) ), mean over samples.

    Summed over classes. The factor T^2 keeps the size of the gradient independent of T. The
    teacher gets no gradient.

    Args:
        teacher: Logits (n, classes, …).
        student: Logits of the same shape.
        temperature: T > 0.
    """
    log_p = F.log_softmax(rows(teacher.detach()) / temperature, dim=1)
    log_q = F.log_softmax(rows(student) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
