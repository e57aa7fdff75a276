"""Federated conformal prediction: sets of classes that hold the right one as often as asked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from strategies import scores
from strategies.context import Calibration, Memo, Tensors
from strategies.protocol import Family, Need, Strategy

CELLS = 1000
LAC_RANGE = 14.0
"""In logits: scores of LAC are told apart down to 8e-7 from 0 and from 1."""
NEAR = 1e-6
"""APS and RAPS: from 1, scores are told apart by so much."""
FAR = 1e3
"""And up to so much."""


class Conformal(Strategy):
    """Split conformal prediction over the union of all sites' validation data.

    With p the probabilities of a sample and p_c that of a class, a score says how strange class c
    would be. The classes whose score is at most q are the sample's set::

        lac   s_c = 1 - p_c
        aps   s_c = sum of p_k over c and the classes k that are more probable
        raps  as aps, + penalty * max(0, rank of c - free_ranks),  ranks from 1

        q = the ceil((N + K) (1 - alpha))-th smallest score of the right class

    over the N validation samples of the K sites. A sample of the same mixture of sites has its class
    in its set with probability at least 1 - alpha (partial exchangeability). **That says nothing of a
    single site**: a site whose data differ may lie far below, so coverage is measured per site, too.

    The probabilities are those after the stack's calibration map, if it has one: sets compose with
    `temperature`. No output is changed.

    A site sends, for val and for test, histograms of the scores of the right class and of all
    classes, ``own`` and ``every``, 2 x 1,000 counts (8 KB a set, whatever the number of classes).
    From those of val follows q, from those of test coverage (share of samples whose own score is at
    most q) and mean set size (scores of all classes at most q, per sample), pooled and per site.

    Exact: q is the upper edge of the cell in which the quantile lies, so coverage and set size are
    those of the sets. Approximate: q is rounded up by at most one cell, so sets hold what the exact
    quantile's do and a little more. Cells are equal in the logit of s for lac (0.028) and in
    sign(s - 1) log(1 + |s - 1| / 1e-6) for aps and raps: they are narrow where scores of sure models
    pile up. Coverage is too high by about half the share of samples in one cell: 0.1 to 0.3 points
    where logits spread over several units, 2 points for a model that is nearly uniform. The last
    cell holds what is beyond, and stands for every class.

    Degenerate case: ``alpha = 0``: every class would be in every set, so none are made.

    Departures: aps and raps here have no random term, so sets are a function of the sample, and a
    little large. The reference of Lu et al. merges t-digests and rounds the quantile to a whole
    per cent; this does neither.

    Attributes:
        alpha: Share of sets that may miss the right class.
        score: Which.
        penalty: Of raps, for each rank beyond the free ones, at most 1.
        free_ranks: Of raps.
    """

    name: ClassVar[str] = "conformal"
    family: ClassVar[Family] = "calibration"
    summary: ClassVar[str] = "Sets of classes with a promised coverage, from histograms of scores."
    paper: ClassVar[str] = (
        "Lu, Yu, Karimireddy, Jordan, Raskar: Federated Conformal Predictors for Distributed "
        "Uncertainty Quantification, ICML 2023, arXiv:2305.17564; RAPS: Angelopoulos, Bates, Malik, "
        "Jordan, ICLR 2021, arXiv:2009.14193"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "val data"})
    degenerate: ClassVar[Mapping[str, Any]] = {"alpha": 0.0}

    alpha: float = Field(0.1, ge=0, lt=1)
    score: Literal["lac", "aps", "raps"] = "lac"
    penalty: float = Field(0.01, ge=0, le=1)
    free_ranks: int = Field(1, ge=0)

    def evaluate(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Histograms of the scores: ``own`` and ``every``, (1000,) int32; samples ``n``."""
        logits, truth = scores.flatten(outputs, targets)
        cell = self._cells(self._places(logits))
        own = cell.gather(1, truth[:, None]).flatten()
        return {
            "own": torch.bincount(own, minlength=CELLS).to(torch.int32),
            "every": torch.bincount(cell.flatten(), minlength=CELLS).to(torch.int32),
            "n": torch.tensor(float(len(truth)), dtype=torch.float64),
        }

    def calibrate(self, sums: Tensors) -> Calibration | None:
        """The largest score of a set, as ``quantile`` and as its ``place``; None without samples."""
        if "own" not in sums or self.alpha == 0:
            return None
        mass = sums["own"].double().clamp_min(0).cumsum(0)
        n, sites = float(mass[-1]), float(sums.get("sites", torch.tensor(1.0)))
        if n <= 0:
            return None
        # The tolerance keeps 0.9 * 110, which is 99.00000000000001, the 99th.
        rank = math.ceil((n + sites) * (1 - self.alpha) - 1e-9)
        cell = int((mass >= rank).nonzero()[0]) if rank <= n else CELLS - 1
        settings = self.model_dump(mode="json")
        if cell == CELLS - 1:
            quantile = None
        else:
            quantile = self._score_at((cell + 1) / CELLS)
        report = {"alpha": self.alpha, "samples": n, "sites": sites}
        if quantile is not None:
            report["quantile"] = quantile
        return Calibration({"cell": cell, "quantile": quantile, **settings}, report)

    def rate(self, sums: Tensors, parameters: Memo) -> dict[str, float]:
        """``coverage``, and ``set_size``: the mean number of classes of a set."""
        n = float(sums["n"])
        if n <= 0:
            return {}
        within = slice(0, int(parameters["cell"]) + 1)
        names = {"coverage": "own", "set_size": "every"}
        return {
            score: float(sums[name][within].double().sum()) / n
            for score, name in names.items()
            if name in sums
        }

    def sets(self, outputs: Tensor, parameters: Memo) -> Tensor:
        """Which classes are in each sample's set, (n, classes) of booleans.

        Args:
            outputs: Logits (n, classes), after the calibration map that it was fitted behind.
            parameters: Its map, as `calibrate` or an export gives it.
        """
        return self._cells(self._places(outputs)) <= int(parameters["cell"])

    def _places(self, logits: Tensor) -> Tensor:
        """Where each class's score lies among the cells, from 0 to 1; ascending in the score."""
        log_p = torch.log_softmax(logits.to(torch.float64), dim=1)
        if self.score == "lac":
            # logit s = log(1 - p) - log p; 1 - p = -expm1(log p) keeps its digits near p = 1.
            odds = torch.log(-torch.expm1(log_p)) - log_p
            return odds / (2 * LAC_RANGE) + 0.5
        p, order = log_p.exp().sort(dim=1, descending=True, stable=True)
        # s - 1 is minus what is less probable, summed from the small end, plus the penalty.
        below = p.flip(1).cumsum(1).flip(1) - p
        above = -below
        if self.score == "raps":
            rank = torch.arange(1, p.shape[1] + 1, device=p.device, dtype=torch.float64)
            above = above + self.penalty * (rank - self.free_ranks).clamp_min(0)
        place = above.sign() * torch.log1p(above.abs() / NEAR)
        low, high = -math.log1p(1 / NEAR), math.log1p(FAR / NEAR)
        return torch.empty_like(place).scatter(1, order, (place - low) / (high - low))

    @staticmethod
    def _cells(places: Tensor) -> Tensor:
        """The cell (k / 1000, (k + 1) / 1000] that a place is in."""
        return ((places * CELLS).ceil() - 1).clamp(0, CELLS - 1).long()

    def _score_at(self, place: float) -> float:
        """The score at a place."""
        if self.score == "lac":
            return 1 / (1 + math.exp(-2 * LAC_RANGE * (place - 0.5)))
        low, high = -math.log1p(1 / NEAR), math.log1p(FAR / NEAR)
        at = low + place * (high - low)
        return 1 + math.copysign(NEAR * math.expm1(abs(at)), at)
