"""CLSA: the lower levels of a network are pulled towards what its top level predicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

from pydantic import Field
from torch import Tensor, nn

from protos.manifest import Placement
from strategies.context import Step
from strategies.distillation.graft import Tap, graft, loss_of, pooled, width_out
from strategies.distillation.softened import divergence
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least, mean
from strategies.task import Task

NAME = "clsa"


class CLSA(Strategy):
    """Cross-level semantic alignment of a network's feature pyramid.

    Each level l below the top gets a classifier of its own over its pooled features, with logits
    z_l. With z the model's logits, y the labels, T the temperature::

        L = CE(z, y) + sum_l CE(z_l, y) + weight * T^2 * sum_l KL( softmax(z / T) || softmax(z_l / T) )

    No gradient of the divergence reaches the top. CE is the stack's loss, by default the task's.
    The classifiers are averaged like the rest, or stay at their site where every site has classes
    (people) of its own; the task's own classifier then has to stay there too, by
    ``Task.placement``. ``farflung export`` leaves them out: the pooled outputs of the levels, each divided by
    its L2 norm and put one behind the other, are the multi-scale feature.

    Degenerate case: ``levels = ()`` has no level below the top.

    Departures: the body of the paper was not at hand; T = 3 and equal weights are assumptions. The
    paper's detector is not here: inputs are crops.

    Attributes:
        levels: Dotted names of the modules whose outputs (n, channels, …) are the levels.
        temperature: T, > 0.
        weight: Of the divergence, >= 0; 0 is deep supervision.
        own: Whether the classifiers of the levels stay at the site.
    """

    name: ClassVar[str] = NAME
    family: ClassVar[Family] = "distillation"
    summary: ClassVar[str] = "A network's top level teaches classifiers on its lower levels."
    paper: ClassVar[str] = (
        "Lan, Zhu, Gong: Person Search by Multi-Scale Matching, ECCV 2018, arXiv:1807.08582"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"levels": ()}

    levels: tuple[str, ...] = ()
    temperature: float = Field(3.0, gt=0)
    weight: float = Field(1.0, ge=0)
    own: bool = False

    def build(self, model: nn.Module, task: Task) -> nn.Module:
        """Put a classifier on each level."""
        if not self.levels:
            return model
        classes = width_out(model, NAME)
        widths = {path: width_out(model, NAME, path) for path in self.levels}
        for path, width in widths.items():
            graft(model, path, partial(Level, width=width, classes=classes), NAME)
        return model

    def placement(self) -> Mapping[str, Placement]:
        """Where the classifiers of the levels live."""
        return {"*level_head.*": "site"} if self.own and self.levels else {}

    def batch(self, step: Step) -> None:
        """Say that the next forward pass is the step's."""
        for level in levels_of(step.model) if self.levels else ():
            level.found.open = True

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Add loss and divergence of each level."""
        if not self.levels:
            return loss
        for level in levels_of(step.model):
            logits = level.found.take()
            loss = loss + loss_of(logits, step)
            if self.weight:
                alignment = divergence(step.outputs, logits, self.temperature)
                loss = loss + self.weight * alignment
        return loss

    def export(self, model: nn.Module) -> nn.Module:
        """Take the classifiers of the levels away."""
        for path, module in list(model.named_modules()):
            if isinstance(module, Level):
                graft(model, path, lambda level: cast(Level, level).body, NAME)
        return model


class Level(nn.Module):
    """A level of the pyramid: the module that was there, and a classifier beside it.

    Attributes:
        body: Gives the features.
        level_head: Their classifier.
        found: Its logits of the last pass in training.

    Args:
        body: Its output is (n, width, …).
        width: Of its output.
        classes: How many.
    """

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.level_head = nn.Linear(width, classes)
        self.body = body
        self.found = Tap()

    def forward(self, inputs: Tensor) -> Tensor:
        """The body's output."""
        features = self.body(inputs)
        if self.training and self.found.open:
            self.found.put(self.level_head(pooled(features)))
        return cast(Tensor, features)


def levels_of(model: nn.Module) -> list[Level]:
    """The levels in a model, in its order."""
    return [m for m in model.modules() if isinstance(m, Level)]


_SITES = ["site0", "site1", "site2"]


def _arm(**params: Any) -> dict[str, Any]:
    levels = {"name": NAME, "levels": ["level0", "level1"], **params}
    return {"strategy": [{"name": "co_learning", "factor": 1.0}, levels]}


def _holds(seeds: Sequence[Seed]) -> list[str]:
    def gain(score: str) -> float:
        aligned, alone = (mean(seeds, arm, f"test.{score}") for arm in ("clsa", "supervised"))
        return 100 * (aligned - alone)

    out: list[str] = []
    for level, bar in (("level0", -2.0), ("level1", -2.0), ("fused", -5.0)):
        out += at_least(f"{level}: mAP over deep supervision, points", gain(f"map_{level}"), bar)
    for level in ("level0", "level1"):
        out += at_least(
            f"{level}: says more often what the top says, points", gain(f"agrees_{level}"), 2.0
        )
    return out


ROW = Row(
    number=7,
    method=NAME,
    claim=(
        "Lower levels that are aligned with the top find people again better, at every scale. Here: "
        "they say more often what the top says, and little is lost; none finds anything better."
    ),
    control="the same classifiers on the levels without alignment (deep supervision)",
    data="M5 as re-identification: digits 0 to 5 are learned, 6 to 9 found again at three scales",
    task="scales",
    sites=[Site(name, {"part": k, "parts": 3}) for k, name in enumerate(_SITES)],
    run={
        "rounds": 3,
        "task": {"name": "scales"},
        "init": {"from": "site:site0"},
        "cohort": {"sites": _SITES, "quorum": "all", "deadline_s": 900.0},
        "local": {
            "work": {"epochs": 10},
            "lr": 0.003,
            "batch_size": 32,
            "optimizer": {"name": "adam"},
        },
        "assess": {"every": 1000},
    },
    arms={"supervised": _arm(weight=0.0), "clsa": _arm(weight=1.0)},
    holds=_holds,
    reproduced="no",
)
