"""What the methods share that let an ensemble of site models teach at the orchestrator."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.data import DataLoader

from protos.errors import TaskFailed
from strategies import scores
from strategies.calibration.temperature import Temperature
from strategies.context import Refinement, SidePayload, Update, seeded
from strategies.distillation.proxy import Proxy, Source, needed_of
from strategies.distillation.softened import divergence, rows
from strategies.protocol import Need, Strategy

CHECK = 100
"""Optimizer steps between two looks at the held-out proxy samples."""

LEAST = 1e-6
"""Nats that a teacher counts for which knows nothing more of its classes than how many there are."""

RARE = 1e-3
"""A class that a teacher finds less often than this among proxy samples counts as found so often."""

Teacher = Literal["average", "uniform", "count", "calibration"]


class EnsembleDistillation(Strategy):
    """A student learns from teachers on proxy data at the orchestrator; not a method by itself.

    Attributes:
        proxy: Where the inputs come from; see `distillation.proxy`.
        samples: At most so many of them, the first ones, >= 1.
        steps: Optimizer steps of a round, >= 0.
        learning_rate: Adam's at the first step, > 0; it falls to 0 along a cosine.
        batch_size: Proxy samples of a step, >= 1.
        temperature: T of the divergence, > 0.
        patience: Stop after so many steps without gain on held-out proxy samples; 0 never stops.
        balance: Whether what only a site's own class frequencies make its teacher say is taken away.
    """

    proxy: Source = "task"
    samples: int = Field(10_000, ge=1)
    steps: int = Field(500, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1)
    temperature: float = Field(1.0, gt=0)
    patience: int = Field(0, ge=0)
    balance: bool = True

    @property
    def needed(self) -> frozenset[Need]:
        """Of a task's proxy data only what is taken from there."""
        return needed_of(self.needs, self.proxy)

    # -- the teachers -----------------------------------------------------------------------------

    def shares(
        self, refinement: Refinement, teacher: Teacher
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Weight p_k (they sum to 1) and temperature T_k of each site's model.

        Raises:
            TaskFailed: No site was counted, or one did not say how calibrated it is.
        """
        if not refinement.weights:
            raise TaskFailed(f"{self.name}: no site was counted", strategy=self.name)
        temperatures = dict.fromkeys(refinement.weights, 1.0)
        raw = dict.fromkeys(refinement.weights, 1.0)
        if teacher == "count":
            raw = dict(refinement.weights)
        elif teacher == "calibration":
            for site in refinement.weights:
                own = refinement.site_payloads.get(site, {}).get(f"{self.name}/calibration")
                if own is None:
                    raise TaskFailed(
                        f"{self.name}: site {site} did not say how calibrated its model is",
                        strategy=self.name,
                    )
                temperatures[site], known = (float(value) for value in own)
                raw[site] = max(known, LEAST)
        total = sum(raw.values())
        return {site: value / total for site, value in raw.items()}, temperatures

    def teach(
        self, refinement: Refinement, proxy: Proxy, teacher: Teacher
    ) -> tuple[Tensor, dict[str, float]]:
        """The teachers' logits on the proxy samples, (samples, classes, …), and the weights.

        Site models are loaded one at a time, and only the mean of their logits is kept.
        """
        if teacher == "average":
            return proxy.logits(refinement.model.to(refinement.device)), {}
        shares, temperatures = self.shares(refinement, teacher)
        reader = copy.deepcopy(refinement.model).to(refinement.device).eval()
        mean, together = torch.zeros(()), torch.zeros(())
        for site, weight, state in refinement.site_models():
            reader.load_state_dict(state, strict=False)  # what lives at a site is not in its state
            logits = proxy.logits(reader) / temperatures[site]
            if self.balance:
                found = frequencies(logits)
                together = together + weight * found
                logits = logits - found.log()
            mean = mean + shares[site] * logits
        if self.balance:
            mean = mean + together.log()
        report = {f"teacher.{site}": share for site, share in shares.items()}
        if teacher == "calibration":
            report |= {f"temperature.{site}": t for site, t in temperatures.items()}
        return mean, report

    # -- the student ------------------------------------------------------------------------------

    def train(
        self, student: nn.Module, refinement: Refinement, proxy: Proxy, targets: Tensor
    ) -> int:
        """Minimise the divergence from the targets; gives the steps that were made.

        With ``patience`` a tenth of the samples is held out, looked at every 100 steps, and the
        student ends as it was when it was closest to the targets there.

        Raises:
            TaskFailed: The loss is not finite (the rate is too high).
        """
        generator = seeded(refinement.seed, refinement.round, self.name)
        positions, held_out = torch.arange(proxy.size), torch.arange(0)
        if self.patience and proxy.size >= 10:
            drawn = torch.randperm(proxy.size, generator=generator)
            held_out, positions = drawn[: proxy.size // 10], drawn[proxy.size // 10 :]
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.learning_rate)
        order = proxy.shuffled(positions, generator)
        best, best_at, kept = math.inf, 0, None
        for number in range(self.steps):
            if len(held_out) and number % CHECK == 0:
                now = self.gap(student, proxy, targets, held_out)
                if now < best:
                    best, best_at, kept = now, number, copy.deepcopy(student.state_dict())
                elif number - best_at >= self.patience:
                    break
            rate = self.learning_rate * (1 + math.cos(math.pi * number / self.steps)) / 2
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(order)
            outputs = refinement.task.forward(student, proxy.inputs(batch))
            loss = divergence(targets[batch].to(outputs.device), outputs, self.temperature)
            if not math.isfinite(loss.item()):
                raise TaskFailed(
                    f"{self.name}: the loss of step {number} is not finite; lower learning_rate",
                    strategy=self.name,
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        else:
            number = self.steps
        if kept is not None and self.gap(student, proxy, targets, held_out) > best:
            student.load_state_dict(kept)
        return number

    def gap(
        self, student: nn.Module, proxy: Proxy, targets: Tensor, positions: Tensor | None = None
    ) -> float:
        """The divergence of the student from the targets over all or some proxy samples."""
        outputs = proxy.logits(student)
        if positions is not None:
            outputs, targets = outputs[positions], targets[positions]
        return float(divergence(targets, outputs, self.temperature))

    # -- what calibration-weighted teachers need of a site ------------------------------------------

    def say_calibration(self, update: Update, batch_size: int = 256) -> None:
        """Add (T_k, I_k) of the trained model on the site's validation data to the update.

        T_k is fitted by `calibration.temperature`, however little it changes, and at least 1. I_k, in
        nats a sample, is the entropy of the classes there less the model's NLL at T_k.

        Raises:
            TaskFailed: The site has no validation data.
        """
        task, model = update.task, update.model
        if task is None or model is None:
            raise LookupError(f"{self.name}: the update has no task or model")
        fitting = Temperature(certainty=0)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        outputs, targets = [], []
        data = task.val_data()
        for batch in DataLoader(data, batch_size, collate_fn=task.collate) if data else ():
            inputs, truth = task.unpack(batch)
            inputs = inputs.to(device) if isinstance(inputs, Tensor) else inputs
            with torch.no_grad():
                outputs.append(task.forward(model, inputs).float().cpu())
            targets.append(truth.cpu())
        sums = fitting.evaluate(torch.cat(outputs), torch.cat(targets)) if outputs else {}
        fitted = fitting.calibrate(sums)
        if fitted is None:
            raise TaskFailed(
                f"{self.name}: teachers are weighed by calibration, but this site has no "
                "validation data",
                strategy=self.name,
            )
        t, nll = fitted.report["temperature"], fitted.report["nll_after"]
        if t < 1:  # softer, never louder: a skewed site finds its own narrow model right
            t, nll = 1.0, fitted.report["nll_before"]
        _, truth = scores.flatten(torch.cat(outputs), torch.cat(targets))
        share = torch.bincount(truth).double() / len(truth)
        said = (t, float(torch.special.entr(share).sum()) - nll)
        update.payloads[f"{self.name}/calibration"] = SidePayload(
            torch.tensor(said, dtype=torch.float64), "keep per site"
        )


def frequencies(logits: Tensor) -> Tensor:
    """How often a teacher finds each class: its mean probabilities, of `RARE` at least.

    Args:
        logits: (n, classes, …).

    Returns:
        (1, classes, …), to be taken from the logits once it is a logarithm.
    """
    found = rows(logits).softmax(dim=1).mean(dim=0).clamp_min(RARE)
    return found.view(1, -1, *[1] * (logits.ndim - 2))
