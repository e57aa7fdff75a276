"""Federated isotonic regression: the more confident, the more often right, and by how much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from strategies.calibration import top_label
from strategies.context import Calibration, Memo, Tensors
from strategies.protocol import Family, Need, Strategy


class Isotonic(Strategy):
    """Isotonic regression of being right on confidence, over all sites' validation data.

    The monotone step function f with the least squared error, by pooling adjacent violators::

        min over f non-decreasing of  sum over samples of ([right] - f(confidence))^2

    A confidence becomes f of it; the other classes share the rest in the proportions that they
    had, and the class that is named stays (`top_label`), so accuracy does not change.

    A site sends counts of samples and of right ones in 1,000 narrow bins of confidence, 8 KB
    whatever the number of classes. Exact: for confidences rounded to those bins this is the
    isotonic regression of the pooled samples (samples of one bin have one value, and their mean
    with their number is all that the problem depends on). Approximate: only that rounding.

    Degenerate case: ``at_least`` above the number of validation samples: no map is fitted.

    Departures: the paper is about two classes and normalises over one-against-the-rest maps; here
    the named class alone is mapped, as in `histogram_binning`. Each step is pulled to its own mean
    confidence by ``prior`` samples, so that a step where all is right does not claim certainty; the
    paper has none.

    Attributes:
        prior: Pseudo-samples of each step, >= 0; 0 is the plain regression.
        at_least: Validation samples of all sites below which no map is fitted.
    """

    name: ClassVar[str] = "isotonic"
    family: ClassVar[Family] = "calibration"
    summary: ClassVar[str] = "The monotone map from confidence to accuracy, fitted from counts."
    paper: ClassVar[str] = (
        "Zadrozny, Elkan: Transforming classifier scores into accurate multiclass probability "
        "estimates, KDD 2002, doi:10.1145/775047.775151"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "val data"})
    degenerate: ClassVar[Mapping[str, Any]] = {"at_least": 2**53}

    prior: float = Field(1.0, ge=0)
    at_least: int = Field(1, ge=1)

    def evaluate(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Counts by confidence, ``counts`` (2, 1000)."""
        return {"counts": top_label.counts(outputs, targets)}

    def calibrate(self, sums: Tensors) -> Calibration | None:
        """The steps of the function; None with too few samples."""
        found = top_label.tally(sums, self.at_least)
        if found is None:
            return None
        count, right = found
        n = float(count.sum())
        steps = pooled(count.tolist(), right.tolist())
        starts = torch.tensor([start for start, _, _ in steps])
        mass, hits = torch.tensor([step[1:] for step in steps], dtype=torch.float64).T
        step = torch.bucketize(torch.arange(len(count)), starts, right=True) - 1
        weighed = count * top_label.middles()
        confidence = torch.zeros_like(mass).index_add_(0, step, weighed) / mass
        # Steps are pulled by different amounts, so what was monotone is made so again.
        values = top_label.shrunk(mass, hits, confidence, self.prior).cummax(dim=0).values
        edges = (starts[1:] / len(count)).tolist()
        report = {"steps": float(len(steps)), "samples": n}
        return Calibration({"edges": edges, "values": values.tolist()}, report)

    def transform(self, outputs: Tensor, parameters: Memo) -> Tensor:
        """Log-probabilities with the confidence of each step."""
        return top_label.relabelled(outputs, parameters["edges"], parameters["values"])


def pooled(count: list[float], right: list[float]) -> list[tuple[int, float, float]]:
    """Adjacent violators pooled: (first cell, samples, right ones) of each step, shares rising.

    Cells without samples belong to the step before them; the first step begins at cell 0.
    """
    steps: list[tuple[int, float, float]] = []
    for cell, (n, hits) in enumerate(zip(count, right, strict=True)):
        if n <= 0:
            continue
        step = (cell, n, hits)
        # Shares compared without dividing: a/n >= b/m as a m >= b n.
        while steps and steps[-1][2] * step[1] >= step[2] * steps[-1][1]:
            first, n0, hits0 = steps.pop()
            step = (first, n0 + step[1], hits0 + step[2])
        steps.append(step)
    return [(0, *steps[0][1:]), *steps[1:]]
