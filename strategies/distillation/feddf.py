"""FedDF: the ensemble of the sites' models teaches the average, on unlabelled proxy data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from protos.plan import Plan
from strategies.context import Refinement, Update
from strategies.distillation.ensemble import EnsembleDistillation
from strategies.distillation.proxy import Source, proxy_of
from strategies.protocol import Family, Need


class FedDF(EnsembleDistillation):
    """Ensemble distillation at the orchestrator, after the average.

    With z_k the logits of site k's model on a proxy sample x, z those of the averaged model in
    training, T the temperature, p_k and T_k the weight and the own temperature of a teacher::

        T^2 * KL( softmax(t / T) || softmax(z / T) )            t = sum_k p_k z_k / T_k

        uniform       p_k = 1/K                             T_k = 1
        count         p_k = the weights of the average      T_k = 1
        calibration   p_k ~ I_k                             T_k >= 1, fitted by the site

    is minimised by Adam with a rate that falls to 0 along a cosine. I_k = H_k - NLL_k is what a
    site's model knows of the site's own validation classes, in nats a sample: their entropy less
    its negative log-likelihood at T_k. Where a site has one class only, its model is always right
    and knows nothing.

    With ``balance`` the ensemble is freed from the class frequencies of single sites. m_k is the
    mean of softmax(z_k / T_k) over all proxy samples, how often teacher k finds each class, and w_k
    is its weight in the average::

        t = sum_k p_k (z_k / T_k - log m_k) + log sum_k w_k m_k

    A site that has seen mostly one class finds it everywhere, on the same proxy samples on which
    the others do not; that is the site's frequency and not the sample. Teachers that agree on the
    frequencies are left as they are. Nothing more is asked of the sites. It is logit adjustment
    (Menon et al., Long-tail Learning via Logit Adjustment, ICLR 2021, arXiv:2007.07314) with what
    the teacher says in the place of the labels' counts. Under strong label skew it decides
    whether the ensemble is better than the average (docs/evidence.md).

    The site models are loaded one at a time, and only the mean of their logits is kept, so memory
    holds two models and one tensor (proxy samples, classes), however many sites there are. The
    weights of the teachers are reported every round.

    Degenerate case: ``steps = 0`` leaves the average as it is, and asks the sites for nothing.

    Departures: the paper takes up to 10,000 steps, looks at labelled validation data every 100 and
    stops after 1,000 without gain; here 500 steps are the default, and ``patience`` looks at the
    divergence on held-out proxy samples, since the orchestrator often has no labels. Both models
    are in evaluation mode: normalisation statistics are those of the average, dropout is off.
    T = 1 (the factor T^2 is then 1) is the paper's, and so is ``teacher = "uniform"`` with ``balance =
    false``; under strong label skew that ensemble is worse than the average which it teaches.
    Balanced teachers, weights by calibration, and generated or condensed inputs are ours.

    Attributes:
        proxy: Where the inputs come from: task, folder:/PATH, condensed, or generated.
        samples: At most so many of them, the first ones, >= 1.
        steps: Optimizer steps, >= 0.
        learning_rate: Adam's at the first step, > 0.
        batch_size: Proxy samples of a step, >= 1.
        temperature: T, > 0.
        patience: Stop after so many steps without gain on held-out proxy samples; 0 never stops.
        balance: Whether teachers are freed from the class frequencies of their sites.
        teacher: Weights of the sites in the ensemble. "calibration" has each site send two numbers,
            which its policy must allow (side_payloads: "keep per site").
    """

    name: ClassVar[str] = "feddf"
    family: ClassVar[Family] = "distillation"
    summary: ClassVar[str] = "The ensemble of the sites' models teaches the average on proxy data."
    paper: ClassVar[str] = (
        "Lin, Kong, Stich, Jaggi: Ensemble Distillation for Robust Model Fusion in Federated "
        "Learning, NeurIPS 2020, arXiv:2006.07242"
    )
    needs: ClassVar[frozenset[Need]] = frozenset(
        {"proxy data", "orchestrator task", "logits", "individual updates"}
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"steps": 0}

    proxy: Source = "task"
    samples: int = Field(10_000, ge=1)
    steps: int = Field(500, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)
    patience: int = Field(0, ge=0)
    balance: bool = True
    teacher: Literal["uniform", "count", "calibration"] = "count"

    @property
    def lasts(self) -> bool:
        """See `Strategy.lasts`: unless calibration weighs the teachers, nothing else is sent."""
        return self.teacher != "calibration" or self.steps == 0

    def encode(
        self, update: Update, plan: Plan, state: dict[str, Tensor]
    ) -> tuple[Update, dict[str, Tensor]]:
        """Where calibration weighs the teachers: say how calibrated this site's model is."""
        if self.teacher == "calibration" and self.steps:
            self.say_calibration(update)
        return update, state

    def refine(self, refinement: Refinement) -> dict[str, float]:
        """Distil the ensemble into the candidate.

        Returns:
            ``teacher.SITE``: the weights; ``kl_before``, ``kl_after``: the divergence over the
            proxy samples; ``samples``; ``steps`` that were made.

        Raises:
            TaskFailed: There is no proxy data, or the loss is not finite (the rate is too high).
        """
        if self.steps == 0:
            return {}
        proxy = proxy_of(refinement, self.proxy, self.samples, self.batch_size, self.name)
        targets, report = self.teach(refinement, proxy, self.teacher)
        model = refinement.model.to(refinement.device).eval()
        report |= {
            "samples": float(proxy.size),
            "kl_before": self.gap(model, proxy, targets),
            "steps": float(self.train(model, refinement, proxy, targets)),
        }
        report["kl_after"] = self.gap(model, proxy, targets)
        return report
