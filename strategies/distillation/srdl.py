"""SRDL: what was learned in the first stage of a run teaches its second stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from protos.plan import Plan, Schedule
from strategies.context import Draft, Memo, Step
from strategies.distillation.past import kept, outputs_of
from strategies.distillation.softened import divergence
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least, mean
from strategies.stack import Stack
from strategies.task import seed_everything


class SRDL(Strategy):
    """Self-referenced deep learning: two stages, and the model of the first teaches the second.

    Rounds before ``start`` are stage one. The base of round ``start`` is the model that stage one
    came to; each site keeps it, and from then on minimises, with z the logits in training, z* the
    kept model's on the same batch (evaluation mode, no gradient), T the temperature::

        loss + weight * T^2 * KL( softmax(z* / T) || softmax(z / T) )

    In both stages each round is one cycle of the learning rate, with u in [0, 1) its done part::

        rate(u) = lr * (decay + (1 - decay) * (1 + cos(pi * u)) / 2)

    so with two rounds the run is the paper's: half of the budget, restart, the other half. The
    kept model and its logits never leave the site; a site that joins later keeps the base that it
    meets first. It costs one forward pass more a step, and a copy of the model at the site.

    Beside it, ``self_distillation`` has a new teacher every round.

    Degenerate case: ``weight = 0, decay = 1`` has no teacher and leaves the schedule as it is.

    Departures: logits are computed again at each step, not stored, since inputs may be augmented.
    The paper restarts stage two from random weights; with ``restart = "random"`` all sites draw
    the same new ones in round ``start``, but "warm" is the default here, since a short stage loses
    more by a new start than a teacher gives back. The rate ends at ``decay`` of its peak instead
    of 0. The paper's text was not at hand: T^2 as the weight, the cosine and the random restart
    are a recollection.

    Attributes:
        weight: Of the divergence beside the factor T^2, >= 0.
        temperature: T, > 0.
        start: First round of stage two, >= 2.
        restart: What round ``start`` trains from: its base, or new random weights.
        decay: Lowest rate of a cycle as a part of the peak, in (0, 1]; 1 leaves the run file's
            schedule.
    """

    name: ClassVar[str] = "srdl"
    family: ClassVar[Family] = "distillation"
    summary: ClassVar[str] = "The model of the run's first stage teaches its second, at each site."
    paper: ClassVar[str] = (
        "Lan, Zhu, Gong: Self-Referenced Deep Learning, ACCV 2018, arXiv:1811.07598"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"weight": 0.0, "decay": 1.0}

    weight: float = Field(1.0, ge=0)
    temperature: float = Field(3.0, gt=0)
    start: int = Field(2, ge=2)
    restart: Literal["warm", "random"] = "warm"
    decay: float = Field(0.001, gt=0, le=1)

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        """Give the round its cycle."""
        if self.decay == 1:
            return draft, memo
        cycle = Schedule(shape="cosine", lr=draft.schedule.lr, decay=self.decay)
        return draft.but(schedule=cycle), memo

    def adopt(
        self, base: dict[str, Tensor], state: dict[str, Tensor], plan: Plan
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keep the first base of stage two that this site meets."""
        if self.weight == 0 or plan.round < self.start or state:
            return base, state
        return base, kept(base)

    def batch(self, step: Step) -> None:
        """Before the first step of stage two, draw new weights if they are asked for."""
        if self.restart == "random" and step.plan.round == self.start and step.index == 0:
            redraw(step)

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add the divergence from the kept model's predictions."""
        if self.weight == 0 or step.plan.round < self.start:
            return loss
        teacher = outputs_of(state, step, "srdl.teacher")
        return loss + self.weight * divergence(teacher, step.outputs, self.temperature)


def redraw(step: Step) -> None:
    """Give the shared tensors new random values, the same at all sites, and forget the momentum."""
    with torch.random.fork_rng():
        seed_everything(step.plan.seed, "srdl", step.plan.round)
        fresh = Stack(step.plan.stack).build(step.task).state_dict()
    with torch.no_grad():
        for name, value in step.model.state_dict().items():
            if name in step.base:
                value.copy_(fresh[name])
    step.optimizer.state.clear()


_SITES = ["site0", "site1", "site2"]
_STAGES = {"name": "srdl", "weight": 0.0}
_TAUGHT = {"name": "srdl"}


def _arm(
    strategy: Mapping[str, Any], train: int, sites: list[str], rounds: int = 2
) -> dict[str, Any]:
    """40 local epochs in all. A site has a third of the samples, and a quarter of the batch."""
    alone = len(sites) == 1
    return {
        "rounds": rounds,
        "strategy": [strategy],
        "task": {"params": {"train": train}},
        "init": {"from": f"site:{sites[0]}"},
        "cohort": {"sites": sites},
        "local": {
            "work": {"epochs": 40 // rounds},
            "lr": 0.05 if alone else 0.01,
            "batch_size": 32 if alone else 8,
        },
    }


def _holds(seeds: Sequence[Seed]) -> list[str]:
    out: list[str] = []
    for case in ("200-alone", "500-alone", "500-sites"):
        vanilla, taught = f"{case}-vanilla", f"{case}-srdl"
        points = 100 * (mean(seeds, taught) - mean(seeds, vanilla))
        out += at_least(f"{case}: accuracy over vanilla, points", points, -1.0)
        less = 1 - mean(seeds, taught, "test.nll") / mean(seeds, vanilla, "test.nll")
        bar = 5.0 if case.endswith("alone") else -5.0
        out += at_least(f"{case}: NLL less than vanilla's, %", 100 * less, bar)
    return out


ROW = Row(
    number=4,
    method="srdl",
    claim=(
        "A network that learns from its own first stage is the better for it. Here, of one data "
        "center alone: its NLL. Of three that average, only that nothing is lost."
    ),
    control="as many epochs in one stage; two stages without a teacher",
    data="M5, 200 and 500 labels in all",
    task="m5",
    sites=[
        *(Site(name, {"part": k, "parts": 3}) for k, name in enumerate(_SITES)),
        Site("union", {}),
    ],
    run={
        "task": {"name": "m5"},
        "cohort": {"quorum": "all", "deadline_s": 900.0},
        "local": {"optimizer": {"name": "sgd", "momentum": 0.9}},
        "assess": {"every": 1000},
    },
    arms={
        f"{train}-{where}-{name}": _arm(strategy, train, sites, rounds)
        for train, where, sites in (
            (200, "alone", ["union"]),
            (500, "alone", ["union"]),
            (500, "sites", _SITES),
        )
        for name, strategy, rounds in (
            # One cosine needs one round; where rounds average, the rate decays over the run.
            ("vanilla", *((_STAGES, 1) if where == "alone" else ({"name": "global_decay"}, 2))),
            ("stages", _STAGES, 2),
            ("srdl", _TAUGHT, 2),
        )
    },
    holds=_holds,
    reproduced="partly",
)
