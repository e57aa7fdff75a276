"""Maps of the confidence alone: how sure is it of the class that it names, and how often right?

What such a map is fitted to are two counts for each of 1,000 narrow bins of the confidence: samples,
and those that are right. They don't grow with the number of classes. Counts of sites add up to those
of the union, so a map fitted to them is the one of the pooled samples, their confidences rounded to
the middle of a bin (by at most 0.0005).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strategies import scores
from strategies.context import Tensors

_LEAST = 1e-9
"""How far a confidence stays from 0 and 1, and the named class ahead of the next (in logits)."""


def counts(outputs: Tensor, targets: Tensor) -> Tensor:
    """Per narrow bin of the confidence how many samples and how many right, (2, 1000) int32."""
    logits, truth = scores.flatten(outputs, targets)
    confidence, predicted = torch.softmax(logits.double(), dim=1).max(dim=1)
    rows = torch.stack([torch.ones_like(predicted), predicted == truth]).to(torch.int32)
    out = torch.zeros(2, scores.FINE, dtype=torch.int32, device=rows.device)
    return out.index_add_(1, scores.fine_bin(confidence), rows)


def tally(sums: Tensors, at_least: int) -> tuple[Tensor, Tensor] | None:
    """Samples and right ones of each narrow bin from pooled `counts`, (1000,) float64 each.

    None with fewer samples than ``at_least``. Counts below zero, which noise makes, are none.
    """
    if "counts" not in sums:
        return None
    count, right = sums["counts"].double().clamp_min(0)
    return None if float(count.sum()) < at_least else (count, right)


def middles() -> Tensor:
    """The middle of each narrow bin, (1000,) float64."""
    return (torch.arange(scores.FINE, dtype=torch.float64) + 0.5) / scores.FINE


def shrunk(count: Tensor, right: Tensor, confidence: Tensor, prior: float) -> Tensor:
    """Share right, as if ``prior`` samples more were as right as their confidence says.

    All float64 of one shape; where there is no sample, the confidence.
    """
    samples = count + prior
    known = samples > 0
    share = (right + prior * confidence) / torch.where(known, samples, torch.ones_like(samples))
    return torch.where(known, share, confidence)


def relabelled(outputs: Tensor, edges: Sequence[float], values: Sequence[float]) -> Tensor:
    """Outputs whose confidence is the value of the bin that it was in.

    The other classes share what is left in the proportions that they had. The class that is named
    stays the same: a value so low that the next class would overtake is raised to just above that.

    Args:
        outputs: Logits, (n, classes).
        edges: Upper edges of all bins but the last, ascending; a bin is (lower, upper].
        values: The confidence of each bin, one more than edges.

    Returns:
        Log-probabilities, (n, classes) float64.
    """
    log_p = torch.log_softmax(outputs.to(torch.float64), dim=1)
    top, named = log_p.max(dim=1, keepdim=True)
    others = log_p.scatter(1, named, -torch.inf)
    rest = torch.logsumexp(others, dim=1, keepdim=True)
    at = torch.tensor(edges, dtype=torch.float64, device=log_p.device)
    to = torch.tensor(values, dtype=torch.float64, device=log_p.device).clamp(_LEAST, 1 - _LEAST)
    wanted = to[torch.bucketize(top.exp(), at)].logit()
    # The others keep their shares, so the next class stays behind if logit q > log p_2 - log rest.
    following = others.max(dim=1, keepdim=True).values - rest
    q = torch.maximum(wanted, following + _LEAST)
    log_q, log_left = torch.nn.functional.logsigmoid(q), torch.nn.functional.logsigmoid(-q)
    out = others - rest + log_left
    return out.scatter(1, named, log_q)
