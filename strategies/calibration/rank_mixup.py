"""RankMixup: a sample deserves more confidence than its blends, and those in the order of their shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from strategies import scores
from strategies.augmentation.mixing import draw
from strategies.calibration.acls import ROW as AS_ACLS
from strategies.context import Step
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, at_least, mean, merged


class RankMixup(Strategy):
    """Mixtures that say in which order confidences have to be, not which labels they have.

    The task's loss is taken on the raw samples alone. Beside them go N mixtures, each with its own
    lambda ~ Beta(beta, beta) and its own permutation pi of the batch, x~ = lambda x + (1-lambda) x_pi,
    each in a forward pass of its own::

        MRL      loss + weight * mean_i [ h(x~_i) - h(x_i) + margin ]_+
        M-NDCG   loss + weight * mean_i ( 1 - min(DCG_i / IDCG_i, IDCG_i / DCG_i) )

        DCG_i  = sum_{p=1..N+1} c_(p) / log2(p + 1)      c: highest softmax probability
        IDCG_i = sum_{p=1..N+1} r_(p) / log2(p + 1)      r: max(lambda, 1 - lambda)

    h is the top logit or the confidence. The raw sample is first, with r = 1; the mixtures follow
    by falling r. Where both samples have one class, a mixture is not less certain: r = 1, and MRL
    leaves the pair out.

    Outputs (n, classes, …) may have further dimensions: positions are samples, and those are left
    out where a target is negative. A training step costs N forward passes more; running statistics
    of BatchNorm see the mixtures too, as in the authors' code.

    Degenerate case: ``weight = 0`` adds nothing.

    Departures: the released code means to leave out pairs of one class, but its mask broadcasts
    over the batch and only scales the mean by the part of mixed pairs: ``same_class = "scale"``.

    Attributes:
        form: MRL ("mrl") or M-NDCG ("m_ndcg").
        weight: Of the term, >= 0 (alpha in the authors' code).
        margin: Of MRL, >= 0. For logits the authors have 2 (CIFAR) and 1 (Tiny-ImageNet).
        on: What h is in MRL: the top logit (as released), or the confidence, for which a margin
            is below 1.
        same_class: What MRL does with pairs of one class: skip them, or scale as released.
        mixups: N, >= 1. None has the authors': 1 for MRL, 3 for M-NDCG.
        beta: Of the Beta distribution, > 0: 2 for CIFAR, 1 for Tiny-ImageNet.
    """

    name: ClassVar[str] = "rank_mixup"
    family: ClassVar[Family] = "calibration"
    summary: ClassVar[str] = "Samples are to be more certain than their blends, in order."
    paper: ClassVar[str] = (
        "Noh, Park, Lee, Ham: RankMixup: Ranking-Based Mixup Training for Network Calibration, "
        "ICCV 2023, arXiv:2308.11990"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"weight": 0.0}

    form: Literal["mrl", "m_ndcg"] = "mrl"
    weight: float = Field(0.1, ge=0)
    margin: float = Field(2.0, ge=0)
    on: Literal["logit", "confidence"] = "logit"
    same_class: Literal["skip", "scale"] = "skip"
    mixups: int | None = Field(None, ge=1, le=32)
    beta: float = Field(2.0, gt=0)

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add the term."""
        if self.weight == 0:
            return loss
        count = self.mixups or (1 if self.form == "mrl" else 3)
        mixtures = [draw(self.name, self.beta, step) for _ in range(count)]
        outputs = [step.task.forward(step.model, m.of(step.inputs)) for m in mixtures]
        theirs = [step.targets[m.partner.to(step.targets.device)] for m in mixtures]
        targets = step.targets
        for other in theirs:  # a position counts where all have a label
            targets = torch.where(other < 0, other, targets)
        raw, truth = scores.flatten(step.outputs, targets)
        if not len(truth):
            return loss
        mixed = torch.stack([scores.flatten(out, targets)[0] for out in outputs])
        kept = targets.reshape(-1) >= 0
        same = torch.stack([other.reshape(-1)[kept] == truth for other in theirs])
        if self.form == "mrl":
            return loss + self.weight * self.mrl(raw, mixed, same)
        shares = raw.new_tensor([max(m.share, 1 - m.share) for m in mixtures])
        ideal = torch.where(same, 1.0, shares[:, None])
        return loss + self.weight * self.m_ndcg(raw, mixed, ideal)

    def mrl(self, raw: Tensor, mixed: Tensor, same: Tensor) -> Tensor:
        """The ranking loss.

        Args:
            raw: Logits of the samples, (n, classes).
            mixed: Logits of their mixtures, (N, n, classes).
            same: Whether both samples of a mixture have one class, (N, n).
        """
        if self.on == "confidence":
            raw, mixed = raw.softmax(dim=-1), mixed.softmax(dim=-1)
        short = F.relu(mixed.max(dim=-1).values - raw.max(dim=-1).values + self.margin)
        differ = (~same).to(short.dtype)
        return (
            (differ * short).mean() if self.same_class == "skip" else differ.mean() * short.mean()
        )

    def m_ndcg(self, raw: Tensor, mixed: Tensor, ideal: Tensor) -> Tensor:
        """The listwise loss.

        Args:
            raw: Logits of the samples, (n, classes).
            mixed: Logits of their mixtures, (N, n, classes).
            ideal: The part of the mixtures' larger label, (N, n).
        """
        confidence = mixed.softmax(dim=-1).max(dim=-1).values
        ideal, order = ideal.sort(dim=0, descending=True, stable=True)
        first = raw.softmax(dim=-1).max(dim=-1).values
        places = torch.arange(2, len(mixed) + 3, device=raw.device, dtype=raw.dtype)
        discount = places.log2().reciprocal()[:, None]
        dcg = (torch.cat([first[None], confidence.gather(0, order)]) * discount).sum(dim=0)
        idcg = (torch.cat([torch.ones_like(first)[None], ideal]) * discount).sum(dim=0)
        return (1 - torch.minimum(dcg / idcg, idcg / dcg)).mean()


def _holds(seeds: Sequence[Seed]) -> list[str]:
    ece = {arm: 100 * mean(seeds, arm, "test.ece") for arm in ROW.arms}
    out = at_least("0.85 x ECE of cross-entropy - of MRL", 0.85 * ece["ce"] - ece["mrl"], 0.0)
    out += at_least("0.7 x ECE of mixup - of MRL", 0.7 * ece["mixup"] - ece["mrl"], 0.0)
    out += at_least("ECE of cross-entropy - of M-NDCG", ece["ce"] - ece["m-ndcg"], 0.0)
    for score in ("test.rank_correlation", "test.above_blend"):
        gap = mean(seeds, "mrl", score) - mean(seeds, "ce", score)
        out += at_least(f"MRL: {score} over cross-entropy", gap, 0.0)
    for arm in ("mrl", "m-ndcg"):
        gap = 100 * (mean(seeds, arm) - mean(seeds, "ce"))
        out += at_least(f"{arm}: accuracy over cross-entropy", gap, -0.5)
        out += at_least(f"{arm}: correlation", mean(seeds, arm, "test.rank_correlation"), 0.3)
    return out


ROW = Row(
    number=48,
    method="rank_mixup",
    claim="The order of confidences is a better teacher of calibration than blended labels.",
    control="cross-entropy, mixup",
    data="M5, 1,000 labels",
    task="m5blends",
    sites=AS_ACLS.sites,
    run=merged(dict(AS_ACLS.run), {"task": {"name": "m5blends"}}),
    arms={
        "ce": {"strategy": []},
        "mixup": {"strategy": [{"name": "mixup", "alpha": 1.0}]},
        "mrl": {"strategy": [{"name": "rank_mixup"}]},
        "mrl-released": {"strategy": [{"name": "rank_mixup", "same_class": "scale"}]},
        "m-ndcg": {"strategy": [{"name": "rank_mixup", "form": "m_ndcg"}]},
        "m-ndcg-1": {"strategy": [{"name": "rank_mixup", "form": "m_ndcg", "weight": 1.0}]},
    },
    holds=_holds,
    reproduced="partly",
)
