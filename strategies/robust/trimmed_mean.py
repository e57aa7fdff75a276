"""Trimmed mean: every coordinate forgets its extremes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from protos.manifest import Tile
from strategies.protocol import Family, Need, Strategy
from strategies.robust.order import BLOCK, sort_rows, sort_with_rows
from strategies.stack import weighted_mean


class TrimmedMean(Strategy):
    """Coordinate-wise trimmed mean, and at its end the coordinate-wise median.

    Of n sites with a weight above zero, each coordinate drops its ``k = floor(trim * n)``
    smallest and k largest values and averages the rest with their weights::

        x_j <- sum over kept i of w_i x_ij / sum over kept i of w_i

    ``trim = 0.5`` is the median: the middle value, or the mean of the two middle ones, without
    weights. It bears fewer than ``trim * n`` sites that lie.

    Degenerate case: ``trim = 0`` is the weighted mean.

    Departures: the paper averages the kept values without weights; here they keep the weights of
    the stack, so that the degenerate case is the plain average. Equal counts give the paper's form.

    Attributes:
        trim: Share dropped at each end, in [0, 0.5].
    """

    name: ClassVar[str] = "trimmed_mean"
    family: ClassVar[Family] = "robust"
    summary: ClassVar[str] = (
        "Each coordinate drops its extremes before the mean; 0.5 is the median."
    )
    paper: ClassVar[str] = (
        "Yin, Chen, Ramchandran, Bartlett: Byzantine-Robust Distributed Learning, ICML 2018, "
        "arXiv:1803.01498"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"individual updates"})
    degenerate: ClassVar[Mapping[str, Any]] = {"trim": 0.0}

    trim: float = Field(0.2, ge=0, le=0.5)

    def reduce(self, stack: Tensor, weights: Tensor, tile: Tile) -> Tensor:
        """Sort each coordinate, drop both ends, average the rest in fp64."""
        stack, weights = stack[weights > 0], weights[weights > 0].to(torch.float64)
        n = len(stack)
        if n == 0:
            return torch.zeros(tile.elements, dtype=torch.float64)
        drop = min(int(self.trim * n), (n - 1) // 2)
        if drop == 0 and self.trim < 0.5:
            return weighted_mean(stack, weights)
        out = torch.empty(tile.elements, dtype=torch.float64)
        for start in range(0, tile.elements, BLOCK):
            rows = stack[:, start : start + BLOCK]
            if self.trim == 0.5:
                middle = sort_rows(rows.clone())[drop : n - drop]
                out[start : start + BLOCK] = torch.stack(middle).to(torch.float64).mean(dim=0)
                continue
            total, weight = torch.zeros(2, rows.shape[1], dtype=torch.float64)
            for values, sites in sort_with_rows(rows, drop, n - drop):
                shares = weights[sites]
                total.addcmul_(values.to(torch.float64), shares)
                weight += shares
            out[start : start + BLOCK] = total / weight
        return out
