"""Federated histogram binning: a confidence becomes how often it was right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from strategies.calibration import top_label
from strategies.context import Calibration, Memo, Tensors
from strategies.protocol import Family, Need, Strategy


class HistogramBinning(Strategy):
    """Histogram binning of the confidence, fitted to the union of all sites' validation data.

    With B_b the samples whose confidence is in bin b, the bins being of equal mass::

        q_b = (number right in B_b + prior * mean confidence of B_b) / (|B_b| + prior)

    A confidence in bin b becomes q_b; the other classes share the rest in the proportions that
    they had, and the class that is named stays (`top_label`), so accuracy does not change.

    A site sends counts of samples and of right ones in 1,000 narrow bins of confidence, 8 KB
    whatever the number of classes. Exact: for its bins the map is the one of the pooled samples.
    Approximate: edges lie on the thousandths, and equal mass holds up to the mass of a narrow bin;
    where many confidences are alike there are fewer bins.

    Degenerate case: ``at_least`` above the number of validation samples: no map is fitted.

    Departures: the paper is about two classes. Guo et al. (2017, section 4.1) bin each class
    against the rest and normalise; here the named class alone is binned (top-label; Gupta and
    Ramdas 2022), so that the sums stay small and accuracy the same. The prior pulls to the bin's
    own confidence, where the paper has none.

    Attributes:
        bins: Bins of equal mass, at most.
        prior: Pseudo-samples of each bin, >= 0; 0 is the plain share, which may be 0 or 1.
        at_least: Validation samples of all sites below which no map is fitted.
    """

    name: ClassVar[str] = "histogram_binning"
    family: ClassVar[Family] = "calibration"
    summary: ClassVar[str] = (
        "Confidence becomes the share of right answers in its bin, from counts."
    )
    paper: ClassVar[str] = (
        "Zadrozny, Elkan: Obtaining calibrated probability estimates from decision trees and naive "
        "Bayesian classifiers, ICML 2001; Gupta, Ramdas: Top-label calibration and "
        "multiclass-to-binary reductions, ICLR 2022, arXiv:2107.08353"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "val data"})
    degenerate: ClassVar[Mapping[str, Any]] = {"at_least": 2**53}

    bins: int = Field(15, ge=1, le=1000)
    prior: float = Field(1.0, ge=0)
    at_least: int = Field(1, ge=1)

    def evaluate(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Counts by confidence, ``counts`` (2, 1000)."""
        return {"counts": top_label.counts(outputs, targets)}

    def calibrate(self, sums: Tensors) -> Calibration | None:
        """Bins and their shares; None with too few samples."""
        found = top_label.tally(sums, self.at_least)
        if found is None:
            return None
        count, right = found
        n = float(count.sum())
        # Bin of a narrow bin: how many edges of equal mass lie below its middle of mass.
        middle = (count.cumsum(0) - count / 2) / n
        index = (middle * self.bins).long().clamp(0, self.bins - 1)
        kept, index = torch.unique(index[count > 0], return_inverse=True)
        own = torch.stack([count, right, count * top_label.middles()])[:, count > 0]
        mass, hits, confidence = torch.zeros(3, len(kept)).double().index_add_(1, index, own)
        values = top_label.shrunk(mass, hits, confidence / mass, self.prior)
        last = torch.nonzero(count > 0).squeeze(1)
        # The upper edge of a bin is that of the last narrow bin in it.
        tops = torch.zeros(len(kept), dtype=torch.int64).scatter_reduce_(0, index, last, "amax")
        edges = ((tops[:-1] + 1) / 1000).tolist()
        report = {"bins": float(len(kept)), "samples": n}
        return Calibration({"edges": edges, "values": values.tolist()}, report)

    def transform(self, outputs: Tensor, parameters: Memo) -> Tensor:
        """Log-probabilities with the confidence of each bin."""
        return top_label.relabelled(outputs, parameters["edges"], parameters["values"])
