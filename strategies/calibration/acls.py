"""ACLS: label smoothing that acts where confidence is too high, and as much as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from strategies import scores
from strategies.context import Step
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least, mean


class ACLS(Strategy):
    """Adaptive and conditional label smoothing: quadratic penalties beyond a margin.

    With f the logits of a sample over C classes, top = argmax_k f_k (the *predicted* class), M the
    margin, [x] = max(0, x), sg the stop-gradient, i a sample of n::

        R = positive_weight * 1 / n          * sum_i           [height_i]^2
          + negative_weight * 1 / (n (C-1))  * sum_i sum_{j != top} [sg(f_top) - f_j - M]^2

        height = f_top - M                  positive = "logit"
                 f_top - min_k f_k - M      positive = "range"

        loss + weight * R

    The first term lowers a top logit that is too high. The second lifts those that lie too far
    below it, and only those: the stop-gradient keeps it off the top logit. Both act in proportion
    to the excess (adaptive), and not at all within the margin (conditional). The margin decides: it
    is a logit, so the right one depends on task and model, and is chosen on validation data. In a
    federation that is the data of all sites and the averaged model, which is less sure than any of the
    models that were trained with the margin: where the average of cross-entropy is calibrated
    already, a margin below its logits makes it under-confident (`docs/evidence.md`, calibration of
    every round). A larger one does not, and a `temperature` behind it cures that, too.

    It reads no labels. Outputs (n, classes, …) may have further dimensions: positions are samples,
    and a classifier's with a negative target are left out.

    Degenerate case: ``weight = 0`` adds nothing.

    Departures: the default is the released form, which has no minimum in the first term; the
    paper's equations have it (``positive = "range"``). The products weight * positive_weight = 0.1
    and weight * negative_weight = 0.01 are those of both.

    Attributes:
        weight: Of R, >= 0 (alpha in the code of the paper).
        positive_weight: Of the term for the predicted class, >= 0.
        negative_weight: Of the term for the others, >= 0.
        margin: M, >= 0, in logits.
        positive: What the margin is compared with in the first term: the top logit as it is
            ("logit", as released) or its height over the lowest ("range", as in the paper).
    """

    name: ClassVar[str] = "acls"
    family: ClassVar[Family] = "calibration"
    summary: ClassVar[str] = "Smooths only what is over-confident, in proportion to the excess."
    paper: ClassVar[str] = (
        "Park, Noh, Oh, Baek, Ham: ACLS: Adaptive and Conditional Label Smoothing for Network "
        "Calibration, ICCV 2023, arXiv:2308.11911"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"weight": 0.0}

    weight: float = Field(0.1, ge=0)
    positive_weight: float = Field(1.0, ge=0)
    negative_weight: float = Field(0.1, ge=0)
    margin: float = Field(10.0, ge=0)
    positive: Literal["logit", "range"] = "logit"

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add the penalty."""
        if self.weight == 0:
            return loss
        return loss + self.weight * self.penalty(scores.rows(step.task, step.outputs, step.targets))

    def penalty(self, logits: Tensor) -> Tensor:
        """R of logits (n, C), a scalar."""
        n, classes = logits.shape
        top = logits.max(dim=1).values  # and not amax: of equal ones, one alone is moved
        height = top if self.positive == "logit" else top - logits.min(dim=1).values
        positive = F.relu(height - self.margin).square().mean()
        # The predicted class itself is -M below: nothing, and no gradient.
        excess = F.relu(top.detach()[:, None] - logits - self.margin)
        negative = excess.square().sum() / (n * (classes - 1))
        return self.positive_weight * positive + self.negative_weight * negative


def _holds(seeds: Sequence[Seed]) -> list[str]:
    ece = {arm: 100 * mean(seeds, arm, "test.ece") for arm in ROW.arms}
    accuracy = {arm: 100 * mean(seeds, arm) for arm in ROW.arms}
    out = at_least("0.6 x ECE of cross-entropy - ECE of ACLS", 0.6 * ece["ce"] - ece["acls"], 0.0)
    out += at_least("ECE of label smoothing - ECE of ACLS", ece["smoothing"] - ece["acls"], 0.0)
    return out + at_least("accuracy over cross-entropy", accuracy["acls"] - accuracy["ce"], -0.5)


ROW = Row(
    number=46,
    method="acls",
    claim="Smoothing only what is over-confident calibrates better than smoothing everything.",
    control="cross-entropy, label smoothing 0.05, MbLS, focal loss",
    data="M5, 1,000 labels",
    task="m5",
    sites=tuple(Site(f"site{k}", {"part": k, "parts": 3}) for k in range(3)),
    run={
        "rounds": 8,
        "task": {"name": "m5", "params": {"train": 1000}},
        "cohort": {"sites": [f"site{k}" for k in range(3)], "quorum": "all", "deadline_s": 900.0},
        "local": {
            "work": {"epochs": 5},
            "batch_size": 32,
            "lr": 0.05,
            "optimizer": {"name": "sgd", "momentum": 0.9},
        },
        "assess": {"every": 1000},  # only the last round
    },
    arms={
        "ce": {"strategy": []},
        "smoothing": {"strategy": [{"name": "label_smoothing", "alpha": 0.05}]},
        "mbls-6": {"strategy": [{"name": "mbls", "margin": 6.0}]},
        "mbls-10": {"strategy": [{"name": "mbls", "margin": 10.0}]},
        "focal": {"strategy": [{"name": "focal"}]},
        "acls": {"strategy": [{"name": "acls"}]},
        "acls-6": {"strategy": [{"name": "acls", "margin": 6.0}]},
        "acls-paper": {"strategy": [{"name": "acls", "positive": "range"}]},
    },
    holds=_holds,
    reproduced="yes",
)
