"""A bag of tricks: small changes to how an image classifier is trained, each with a switch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from protos.errors import ConfigInvalid
from protos.plan import Schedule
from strategies import scores
from strategies.augmentation.mixing import Mixture, draw
from strategies.context import Draft, Memo, Step
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least, mean
from strategies.task import Task

FLOOR = 0.001
"""Last rate of a cosine as a part of its first one: a plan's rate is never nought."""


class BagOfTricks(Strategy):
    r"""The refinements of training that the paper stacks, as options of one strategy.

    With lr the rate of the run file, b its batch size, K classes, y the label of a sample, u the
    done part of a round, R rounds, W = ``warm_up`` rounds of m steps in all::

        linear scaling    lr * b / reference
        warm-up           step i of the first m:  rate * i / m,  i = 1 .. m
        cosine            rate(u) = lr * (1 + cos(pi u)) / 2
        step              rate    = lr * 0.1 ** floor(4 (round - 1) / R)
        no bias decay     weight decay only on tensors with two dimensions or more
        zero gamma        weight of the last normalisation of each residual block = 0
        label smoothing   q_y = 1 - e,  q_c = e / (K - 1) for the others;  loss = - sum_c q_c log p_c
        mixup             x~ = l x + (1 - l) x_pi,  the same for the labels,  l ~ Beta(a, a)

    "step" is the paper's own starting point, a tenth of the rate after each quarter (30, 60 and 90
    of 120 epochs); the cosine is what it recommends instead. Zero gamma makes every residual block
    begin as the identity. With label smoothing the best gap between the logit of the right class
    and the others is finite: log((K - 1)(1 - e) / e).

    Degenerate case: ``reference = 0``, ``warm_up = 0``, ``schedule = "given"``, no bias decay off,
    ``zero_gamma = ""``, ``smoothing = 0``, ``mixup = 0`` train as without it.

    Departures: a round starts its cosine anew (as co-learning's cycle does), and ends it at a
    thousandth of the rate; the rate climbs in the first rounds of the run only. Each site scales by
    its own batch, since it makes its steps alone; the paper's batch is that of all its workers. Low
    precision is the site's own affair (``precision`` in ``site.toml``), the ResNet-B, -C and -D
    tweaks are the task's model, and a teacher is a strategy of its own (``self_distillation``,
    ``feddf``). A task's own loss, with class weights perhaps, is replaced as soon as labels are
    smoothed.

    Attributes:
        reference: Batch size that the run file's rate is meant for, 256 in the paper; 0: the rate
            is used as it is.
        warm_up: Rounds over which the rate climbs, >= 0; with five local epochs one is the paper's.
        schedule: cosine or step as above; given leaves what the run file, or another strategy, says.
        no_bias_decay: Whether biases and the vectors of normalisation layers are left undecayed.
        zero_gamma: Names of the last normalisation layer of each residual block, as a pattern
            (``*.bn3`` of torchvision's bottlenecks); empty: none.
        smoothing: e, in [0, 0.5); 0.1 in the paper.
        mixup: a, >= 0; 0.2 in the paper, whose runs with it are longer (200 epochs, not 120).
    """

    name: ClassVar[str] = "bag_of_tricks"
    family: ClassVar[Family] = "recipes"
    summary: ClassVar[str] = "Warm-up, cosine, no bias decay, zero gamma, smoothing, mixup."
    paper: ClassVar[str] = (
        "He, Zhang, Zhang, Zhang, Xie, Li: Bag of Tricks for Image Classification with "
        "Convolutional Neural Networks, CVPR 2019, arXiv:1812.01187"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {
        "reference": 0,
        "warm_up": 0.0,
        "schedule": "given",
        "no_bias_decay": False,
        "zero_gamma": "",
        "smoothing": 0.0,
        "mixup": 0.0,
    }
    blends_labels: ClassVar[bool] = True

    reference: int = Field(0, ge=0)
    warm_up: float = Field(1.0, ge=0)
    schedule: Literal["given", "cosine", "step"] = "cosine"
    no_bias_decay: bool = True
    zero_gamma: str = ""
    smoothing: float = Field(0.1, ge=0, lt=0.5)
    mixup: float = Field(0.0, ge=0)

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        """Scale the rate, and choose the round's schedule."""
        given = draft.schedule
        lr = given.lr * (draft.batch_size / self.reference if self.reference else 1.0)
        match self.schedule:
            case "given":
                chosen = given.model_copy(update={"lr": lr})
            case "cosine":
                chosen = Schedule(shape="cosine", lr=lr, decay=FLOOR)
            case "step":
                quarter = 4 * (draft.round - 1) // draft.rounds
                chosen = Schedule(shape="constant", lr=lr * 0.1**quarter)
        return draft.but(schedule=chosen), memo

    def build(self, model: nn.Module, task: Task) -> nn.Module:
        """Set the last gammas of the residual blocks to zero.

        Raises:
            ConfigInvalid: No normalisation layer has such a name.
        """
        if not self.zero_gamma:
            return model
        found = [
            module
            for name, module in model.named_modules()
            if fnmatchcase(name, self.zero_gamma) and isinstance(module.weight, nn.Parameter)
        ]
        if not found:
            raise ConfigInvalid(
                f'strategy {self.name}: zero_gamma = "{self.zero_gamma}" is the name of no layer '
                f"with a weight in the model of the task {type(task).__name__}",
                key=f"strategy.{self.name}.zero_gamma",
            )
        with torch.no_grad():
            for module in found:
                cast(nn.Parameter, module.weight).zero_()
        return model

    def batch(self, step: Step) -> None:
        """Set the rate of a step of the warm-up, sort the parameters once, blend the samples."""
        if self.no_bias_decay and step.index == 0:
            spare_vectors(step.optimizer)
        m = self.warm_up * step.total
        i = (step.plan.round - 1) * step.total + step.index + 1
        if i < m:
            step.learning_rate *= i / m
            for group in step.optimizer.param_groups:
                group["lr"] = step.learning_rate
        if self.mixup:
            mixture = draw(self.name, self.mixup, step)
            step.inputs = mixture.of(step.inputs)
            step.scratch[self.name] = mixture

    def loss(self, step: Step) -> Tensor:
        """The task's loss, or the smoothed cross-entropy; against both labels of a blend."""
        if not self.mixup:
            return self._against(step, step.targets)
        mixture: Mixture = step.scratch[self.name]
        partner = step.targets[mixture.partner.to(step.targets.device)]
        first, second = (self._against(step, targets) for targets in (step.targets, partner))
        return mixture.share * first + (1 - mixture.share) * second

    def _against(self, step: Step, targets: Tensor) -> Tensor:
        if not self.smoothing:
            return step.task.loss(step.outputs, targets)
        logits, truth = scores.flatten(step.outputs, targets)
        classes = logits.shape[1]
        # torch spreads its parameter over all classes, the right one among them.
        return F.cross_entropy(
            logits, truth, label_smoothing=self.smoothing * classes / (classes - 1)
        )


def spare_vectors(optimizer: Optimizer) -> None:
    """Take tensors of less than two dimensions out of an optimizer's weight decay."""
    for group in list(optimizer.param_groups):
        if not group.get("weight_decay"):
            continue
        vectors = [p for p in group["params"] if p.ndim < 2]
        if not vectors:
            continue
        group["params"] = [p for p in group["params"] if p.ndim >= 2]
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        optimizer.add_param_group({**options, "params": vectors, "weight_decay": 0.0})


_SITES = tuple(Site(f"site{k}", {"part": k, "parts": 3}) for k in range(3))
_OFF = {"name": "bag_of_tricks", **(BagOfTricks.degenerate or {})}
_CURVE = {**_OFF, "schedule": "cosine", "warm_up": 1 / 3}  # one of a round's three epochs
_HYGIENE = {**_CURVE, "no_bias_decay": True, "smoothing": 0.1}


def _holds(seeds: Sequence[Seed]) -> list[str]:
    accuracy = {arm: 100 * mean(seeds, arm) for arm in ROW.arms}
    out = at_least("cosine over step decay", accuracy["cosine"] - accuracy["base"], 0.7)
    return out + at_least("all tricks over none", accuracy["all"] - accuracy["base"], 0.0)


ROW = Row(
    number=30,
    method="bag_of_tricks",
    claim="Small refinements of the schedule and the labels add up.",
    control="the paper's own starting point, a tenth of the rate after each quarter",
    data="P10, 12 epochs",
    task="p10",
    sites=_SITES,
    run={
        "task": {"name": "p10"},
        "rounds": 4,
        "init": {"from": "task"},
        "cohort": {"sites": [s.name for s in _SITES], "quorum": "all", "deadline_s": 900.0},
        "local": {
            "work": {"epochs": 3},
            "batch_size": 32,
            "lr": 0.05,
            "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 5e-4},
        },
        "assess": {"every": 1000},  # only the last round
    },
    arms={
        "base": {"strategy": [{**_OFF, "schedule": "step"}]},
        "cosine": {"strategy": [_CURVE]},
        "hygiene": {"strategy": [_HYGIENE]},
        "all": {"strategy": [{**_HYGIENE, "mixup": 0.2}]},
    },
    holds=_holds,
    reproduced="partly",
)
