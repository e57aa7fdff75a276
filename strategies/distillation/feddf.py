"""FedDF: the sites' models, as an ensemble, teach their average on data that nobody owns."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from protos.errors import TaskFailed
from strategies.context import Refinement, seeded
from strategies.distillation.softened import divergence
from strategies.protocol import Family, Need, Strategy


class FedDF(Strategy):
    """Ensemble distillation at the orchestrator, after the average.

    With z_k the logits of site k's model on a proxy sample, z those of the averaged model in
    training, T the temperature, p_k = 1/K (uniform) or the weights of the average (count)::

        T^2 * KL( softmax(sum_k p_k z_k / T) || softmax(z / T) )

    is minimised by Adam with a rate that falls to 0 along a cosine. The site models are loaded one
    at a time, and only the mean of their logits is kept, so memory holds two models and one
    tensor (proxy samples, classes), however many sites there are.

    Degenerate case: ``steps = 0`` leaves the average as it is.

    Departures: the paper takes up to 10,000 steps and stops early on validation data; here the
    steps are given (500), since the orchestrator often has no labelled data. Both models are in
    evaluation mode: normalisation statistics are those of the average, dropout is off.
    T = 1 (the factor T^2 is then 1) and uniform weights are the paper's.

    Attributes:
        steps: Optimizer steps, >= 0.
        learning_rate: Adam's at the first step, > 0.
        batch_size: Proxy samples of a step, >= 1.
        temperature: T, > 0.
        teacher: Weights of the sites in the ensemble.
        samples: At most so many proxy samples are used, the first ones, >= 1.
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

    steps: int = Field(500, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)
    teacher: Literal["uniform", "count"] = "uniform"
    samples: int = Field(10_000, ge=1)

    def refine(self, refinement: Refinement) -> dict[str, float]:
        """Distil the ensemble into the candidate.

        Returns:
            The divergence over the proxy samples before and after, and how many samples there are.

        Raises:
            TaskFailed: There is no proxy data, or the loss is not finite (the rate is too high).
        """
        if self.steps == 0:
            return {}
        proxy = _Proxy(refinement, self.samples, self.batch_size)
        targets = self._ensemble_logits(refinement, proxy)
        model = refinement.model.to(refinement.device).eval()
        report = {"samples": float(proxy.size), "kl_before": self._kl(model, proxy, targets)}
        self._train(model, refinement, proxy, targets)
        report["kl_after"] = self._kl(model, proxy, targets)
        return report

    def _ensemble_logits(self, refinement: Refinement, proxy: _Proxy) -> Tensor:
        total = sum(refinement.weights.values())
        reader = copy.deepcopy(refinement.model).to(refinement.device).eval()
        mean: Tensor | None = None
        for _, weight, state in refinement.site_models():
            reader.load_state_dict(state, strict=False)  # what lives at a site is not in its state
            share = weight / total if self.teacher == "count" else 1 / len(refinement.weights)
            logits = share * proxy.logits(reader)
            mean = logits if mean is None else mean.add_(logits)
        if mean is None:
            raise TaskFailed("feddf: no site was counted in this round", strategy=self.name)
        return mean

    def _train(
        self, model: nn.Module, refinement: Refinement, proxy: _Proxy, targets: Tensor
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        order = proxy.shuffled(seeded(refinement.seed, refinement.round, self.name))
        for number in range(self.steps):
            rate = self.learning_rate * (1 + math.cos(math.pi * number / self.steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(order)
            outputs = refinement.task.forward(model, proxy.inputs(batch))
            loss = divergence(targets[batch].to(outputs.device), outputs, self.temperature)
            if not math.isfinite(loss.item()):
                raise TaskFailed(
                    f"feddf: the loss of step {number} is not finite; lower learning_rate",
                    strategy=self.name,
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _kl(self, model: nn.Module, proxy: _Proxy, targets: Tensor) -> float:
        return float(divergence(targets, proxy.logits(model), self.temperature))


class _Proxy:
    """The proxy samples of a refinement, by position."""

    def __init__(self, refinement: Refinement, samples: int, batch_size: int) -> None:
        data = refinement.task.proxy_data()
        if data is None:
            raise TaskFailed(
                "feddf: the orchestrator's task has no proxy_data; the run's parameters of the "
                "task may have to ask for it",
                strategy=FedDF.name,
            )
        self.data = cast(Any, data)
        self.task = refinement.task
        self.device = refinement.device
        self.size = min(len(self.data), samples)
        self.batch_size = batch_size

    def inputs(self, positions: Tensor) -> Any:
        """The inputs of some samples; a sample is an input, bare or as a tuple of one."""
        batch = self.task.collate([self.data[i] for i in positions.tolist()])
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            batch = batch[0]
        return batch.to(self.device) if isinstance(batch, Tensor) else batch

    def logits(self, model: nn.Module) -> Tensor:
        """Logits of all samples on the CPU, (samples, classes, …)."""
        with torch.no_grad():
            parts = [
                self.task.forward(model, self.inputs(positions)).to("cpu", torch.float32)
                for positions in self._batches(torch.arange(self.size))
            ]
        return torch.cat(parts)

    def shuffled(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Batches of positions, each sample once a pass, in a new order every pass, for ever."""
        while True:
            yield from self._batches(torch.randperm(self.size, generator=generator))

    def _batches(self, positions: Tensor) -> list[Tensor]:
        starts = range(0, len(positions), self.batch_size)
        return [positions[start : start + self.batch_size] for start in starts]
