"""ONE: branches of one network, mixed by a gate, teach each of them while they all learn."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from protos.errors import ConfigInvalid
from protos.manifest import Placement
from strategies.context import Step
from strategies.distillation.graft import (
    Tap,
    graft,
    join_tail,
    last_layer,
    loss_of,
    pooled,
    width_in,
)
from strategies.distillation.softened import divergence
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least, mean
from strategies.task import Task

NAME = "one"


class ONE(Strategy):
    """On-the-fly native ensemble: the tail of the model in several branches, and a gate.

    With h what enters the tail, z_i the logits of branch i = 0 … m, y the labels, T the
    temperature::

        g   = softmax(ReLU(BN(FC(pool(h)))))                          the gate
        z_e = sum_i g_i z_i                                           the teacher
        L   = sum_i CE(z_i, y) + CE(z_e, y)
              + weight * w * T^2 * sum_i KL( softmax(z_e / T) || softmax(z_i / T) )
        w   = exp(-5 (1 - min(t, ramp) / ramp)^2)                     t: rounds done

    No gradient of the divergence reaches the teacher: the gate learns from CE(z_e, y) alone. CE is
    the stack's loss, by default the task's. Branch 0 has the weights that the task drew; the others
    draw theirs.

    What of it is averaged is a choice, since tensors can live at their site:

    =========== ==========================================================================
    whole       everything
    personal    everything but the last branch, which is the site's own
    deployed    trunk, gate and branch 0; the other branches only help to train it
    trunk       trunk and gate; every branch is the site's own
    =========== ==========================================================================

    In evaluation the model gives what is deployed; what lives at a site counts there as the site
    has it. ``farflung export`` keeps branch 0 in the tail's place, or the whole ensemble, and says
    which of it lives at the sites only.

    Degenerate case: ``branches = 1`` leaves the model as it is.

    Departures: t counts rounds, where the reference code counts 80 of 300 epochs; the ramp is a
    tip of that code, and the paper's own objective is ``ramp = 0``. The branches are copies of
    the tail with new values from ``reset_parameters`` of its layers.

    Attributes:
        branches: m + 1, >= 1.
        tail: Dotted name of the module that is copied; in an ``nn.Sequential`` everything after it
            belongs to it. Its output has to be the model's. Empty: the last layer.
        temperature: T, > 0.
        weight: Of the divergence, >= 0; 0 has branches and gate without distillation.
        ramp: Rounds until the divergence has its full weight, >= 0; 0 has it at once.
        exchange: What is averaged, see above.
        deploy: What evaluation asks and an export keeps.
    """

    name: ClassVar[str] = NAME
    family: ClassVar[Family] = "distillation"
    summary: ClassVar[str] = "Branches of one model, mixed by a gate, teach each other at the site."
    paper: ClassVar[str] = (
        "Lan, Zhu, Gong: Knowledge Distillation by On-the-Fly Native Ensemble, NeurIPS 2018, "
        "arXiv:1806.04606"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"branches": 1}

    branches: int = Field(3, ge=1)
    tail: str = ""
    temperature: float = Field(3.0, gt=0)
    weight: float = Field(1.0, ge=0)
    ramp: float = Field(2.0, ge=0)
    exchange: Literal["whole", "personal", "deployed", "trunk"] = "whole"
    deploy: Literal["branch", "ensemble"] = "branch"

    def build(self, model: nn.Module, task: Task) -> nn.Module:
        """Put branches and gate in the place of the tail."""
        if self.branches == 1:
            return model
        path = self.tail or last_layer(model)
        join_tail(model, path, self.name)
        graft(model, path, lambda tail: NativeEnsemble(tail, self.branches, self.deploy), NAME)
        return model

    def placement(self) -> Mapping[str, Placement]:
        """The last branches live at the site, as many as ``exchange`` says."""
        n = self.branches
        own = {"whole": 0, "personal": 1, "deployed": n - 1, "trunk": n}[self.exchange]
        kept = range(n - own, n) if n > 1 else range(0)
        return {f"*native_branches.{k}.*": "site" for k in kept}

    def batch(self, step: Step) -> None:
        """Say that the next forward pass is the step's."""
        if self.branches > 1:
            ensemble_of(step.model).found.open = True

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add what the other branches, the gate and the teacher have to say."""
        if self.branches == 1:
            return loss
        logits, teacher = ensemble_of(step.model).found.take()
        for other in (*logits[1:], teacher):
            loss = loss + loss_of(other, step)
        weight = self.weight * ramp_up(step.plan.round - 1 + step.index / step.total, self.ramp)
        if weight == 0:
            return loss
        return loss + weight * sum(divergence(teacher, z, self.temperature) for z in logits)

    def export(self, model: nn.Module) -> nn.Module:
        """Keep branch 0 in the place of the tail; an ensemble stays whole."""
        if self.branches == 1 or self.deploy == "ensemble":
            return model
        for path, module in list(model.named_modules()):
            if isinstance(module, NativeEnsemble):
                graft(model, path, lambda it: cast(NativeEnsemble, it).native_branches[0], NAME)
        return model


class NativeEnsemble(nn.Module):
    """Branches and a gate in the place of a model's tail.

    In training it gives the logits of branch 0, and leaves those of all branches and the
    teacher's in ``found`` if that is open.

    Attributes:
        native_branches: Branch 0 is the tail that was there.
        gate: Linear layer and batch normalisation over the pooled features.
        found: (logits of each branch, logits of the teacher) of the last pass in training.

    Args:
        tail: Maps features (n, channels, …) to logits (n, classes, …).
        branches: How many.
        deploy: What it gives in evaluation.
    """

    def __init__(
        self, tail: nn.Module, branches: int, deploy: Literal["branch", "ensemble"]
    ) -> None:
        super().__init__()
        others = [redrawn(copy.deepcopy(tail)) for _ in range(1, branches)]
        width = width_in(tail, NAME)
        self.gate = nn.Sequential(nn.Linear(width, branches), nn.BatchNorm1d(branches))
        self.native_branches = nn.ModuleList([tail, *others])
        self.deploy = deploy
        self.found = Tap()

    def forward(self, features: Tensor) -> Tensor:
        """Logits: of branch 0, or in evaluation of what is deployed."""
        asked = self.training and self.found.open
        if not asked and (self.training or self.deploy == "branch"):
            return cast(Tensor, self.native_branches[0](features))
        logits = [branch(features) for branch in self.native_branches]
        teacher = mixed(torch.stack(logits, dim=1), self.weights(features))
        if not asked:
            return teacher
        self.found.put((logits, teacher))
        return cast(Tensor, logits[0])

    def weights(self, features: Tensor) -> Tensor:
        """The gate: features -> (n, branches), rows sum to one."""
        return opened(self.gate(pooled(features)))


def opened(scores: Tensor) -> Tensor:
    """softmax(ReLU(scores)) over branches, (n, branches)."""
    return scores.relu().softmax(dim=1)


def mixed(logits: Tensor, weights: Tensor) -> Tensor:
    """(n, branches, classes, …) and (n, branches) -> (n, classes, …)."""
    return torch.einsum("nb...,nb->n...", logits, weights)


def ramp_up(t: float, length: float) -> float:
    """exp(-5 (1 - min(t, length) / length)^2); 1 for length 0."""
    if length == 0:
        return 1.0
    return math.exp(-5 * (1 - min(t, length) / length) ** 2)


def ensemble_of(model: nn.Module) -> NativeEnsemble:
    """The native ensemble in a model."""
    return next(m for m in model.modules() if isinstance(m, NativeEnsemble))


def redrawn(module: nn.Module) -> nn.Module:
    """The module with new random values.

    Raises:
        ConfigInvalid: A layer has parameters but no ``reset_parameters``; names it.
    """
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None)
        if callable(reset):
            reset()
        elif next(layer.parameters(recurse=False), None) is not None:
            raise ConfigInvalid(
                f"strategy one: {type(layer).__name__} has parameters but no reset_parameters, so "
                "no second branch can be drawn; give it one, or choose another tail",
                key="strategy.one.tail",
            )
    return module


_SITES = ["site0", "site1", "site2"]


def _arm(**params: Any) -> dict[str, Any]:
    cycle = {"name": "co_learning", "factor": 1.0}
    branches = [{"name": NAME, "tail": "tail", "ramp": 0.8, **params}] if params else []
    return {"strategy": [cycle, *branches]}


def _holds(seeds: Sequence[Seed]) -> list[str]:
    out: list[str] = []
    for what, arm in (("branch 0", "one"), ("the gated ensemble", "ensemble")):
        points = 100 * (mean(seeds, arm) - mean(seeds, "single"))
        out += at_least(f"{what} over a network alone, points", points, -1.0)
    return out


ROW = Row(
    number=6,
    method=NAME,
    claim=(
        "A branch that learned from the gated ensemble of its siblings beats a network alone. Here: "
        "neither it nor the ensemble is worse, at the cost of two more branches in training."
    ),
    control="a single branch, three branches without distillation",
    data="P10",
    task="p10",
    sites=[Site(name, {"part": k, "parts": 3}) for k, name in enumerate(_SITES)],
    run={
        "rounds": 3,
        "task": {"name": "p10"},
        "init": {"from": "site:site0"},
        "cohort": {"sites": _SITES, "quorum": "all", "deadline_s": 900.0},
        # The losses of four outputs are four times the step for SGD; Adam does not mind.
        "local": {
            "work": {"epochs": 8},
            "lr": 0.003,
            "batch_size": 16,
            "optimizer": {"name": "adam"},
        },
        "assess": {"every": 1000},
    },
    arms={
        "single": _arm(),
        "undistilled": _arm(weight=0.0),
        "one": _arm(weight=1.0),
        "ensemble": _arm(weight=1.0, deploy="ensemble"),
    },
    holds=_holds,
    reproduced="no",
)
