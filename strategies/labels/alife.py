"""ALIFE: sites meet new classes, and what the model knows of the old ones stays."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from protos.errors import ConfigInvalid
from protos.plan import Plan
from strategies import scores
from strategies.context import Draft, Memo, Step
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least, mean
from strategies.task import Task

ARRIVED = "alife_arrived"
"""Buffer of a head: how many of its last outputs have been announced. A counter, so sites agree."""

CLOSED = -1e4
"""The logit of a class that did not arrive: e to its power is 0, and its square is still a number."""


class Alife(Strategy):
    r"""The adaptive logit regulariser (ALI) for classes that arrive when others are taken for known.

    The task's model knows O classes, one of them "background": whatever is not labelled. The run
    file announces ``new`` further ones, and both ends widen the head by as many outputs. In the
    sites' new data only the new classes are labelled; samples of old ones appear as background.
    With z the logits of a sample over all O + N classes, p the softmax of the frozen base's logits
    over the old ones::

        loss = CE(z, y)                                     mean over labelled samples
             + ali * (logsumexp_c z_c - sum_{c in O} p_c z_c)           over background
             + kd * -(1 / O) sum_{c in O} p_c log softmax(z_{1..O})_c   over labelled samples

    The second term is the cross-entropy to what the base believes, within the new softmax: for a
    sample that the base recognises it is a label, for one that it doesn't know it asks for little
    (its gradient is softmax(z)_c - p_c). A site without any new class has background only and
    trains with the second term alone, so that an arrival elsewhere does not erase what it knows.

    A new output starts as a copy of the background's, and the biases of all of these are lowered by
    log(N + 1) (MiB's initialisation): together they have the probability that the background had.
    The base's own belief in background is that of all of these together.

    Classes may also arrive later: ``since`` names the round of each new one, and the plan of that
    round announces it. The head is as wide as it will be from the first round on, since a run has
    one manifest; an output that was not announced has the logit -10,000 and no gradient. The site
    that gets the announcement opens it as above, with what the background's output has learned by
    then. Classes of earlier rounds are old ones from then on, and belong to O.

    A run that starts from a model of the task (``RUN@ROUND``, a file) widens that model's head.

    No gradient reaches the base.

    Degenerate case: ``new = 0`` leaves model and loss as they are.

    Departures: the old model is the base of each round, not that of the first one. The paper's
    subject is segmentation; here positions are samples, whatever their number, and what was measured
    is classification. Its second half, features that learnt rotations carry along, is a strategy of
    its own, ``feature_replay``, since it has features leave the sites.

    Attributes:
        new: N, classes that arrive with this run, >= 0.
        since: The rounds that announce them, one for each, none before the one in front of it;
            empty: all of them come with the run's first round.
        background: The label of what is not labelled, among the task's own.
        ali: Weight of the regulariser, >= 0; 2 in the paper's VOC 15-5, 1 in ADE20K 100-50.
        kd: Weight of the distillation on labelled samples, >= 0.
        keep: How old classes are kept. ali as above; the others are what it is compared with: mib
            (Cermelli et al. 2020: background stands for all old classes in the cross-entropy, and
            for all new ones in the distillation), kd (background is a class, and distillation on
            all samples), none (background is a class).
        head: Name of the layer that gives the logits; empty: the last linear one.
    """

    name: ClassVar[str] = "alife"
    family: ClassVar[Family] = "labels"
    summary: ClassVar[str] = "New classes arrive, and old ones that are not labelled any more stay."
    paper: ClassVar[str] = (
        "Oh, Baek, Ham: ALIFE: Adaptive Logit Regularizer and Feature Replay for Incremental "
        "Semantic Segmentation, NeurIPS 2022, arXiv:2210.06816"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"new": 0}

    new: int = Field(1, ge=0, le=10_000)
    since: tuple[Annotated[int, Field(ge=1)], ...] = ()
    background: int = Field(0, ge=0)
    ali: float = Field(2.0, ge=0)
    kd: float = Field(1.0, ge=0)
    keep: Literal["ali", "mib", "kd", "none"] = "ali"
    head: str = ""

    @model_validator(mode="after")
    def _one_for_each(self) -> Alife:
        if self.since and (len(self.since) != self.new or list(self.since) != sorted(self.since)):
            raise ValueError(
                f"since: a round for each of the {self.new} new classes, in the order of time"
            )
        return self

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        """Say which classes have arrived: ``arrived`` in all, ``known`` of them before the last ones."""
        if not self.since:
            return draft, memo
        there = [number for number in self.since if number <= draft.round]
        known = sum(number < there[-1] for number in there) if there else 0
        told = {"arrived": len(there), "known": known}
        return draft.but(payload={**draft.payload, self.name: told}), memo

    def build(self, model: nn.Module, task: Task) -> nn.Module:
        """Widen the head.

        Raises:
            ConfigInvalid: There is no such head, or it has no such background.
        """
        if self.new == 0:
            return model
        name, layer = head_of(model, self.head, self.name)
        if self.background >= len(layer.weight):
            raise ConfigInvalid(
                f"strategy {self.name}: the head {name} has {len(layer.weight)} outputs, and none of "
                f"them is {self.background}, the background",
                key=f"strategy.{self.name}.background",
            )
        out = widened(layer, self.new, self.background, shared=not self.since)
        if self.since:
            out.register_buffer(ARRIVED, torch.zeros((), dtype=torch.int64))
            out.register_forward_hook(partial(_closed, new=self.new))
        return _replaced(model, name, out)

    def adopt(
        self, base: dict[str, Tensor], state: dict[str, Tensor], plan: Plan
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Open the outputs of classes that this plan announces."""
        wanted = plan.payload.get(self.name, {}).get("arrived", 0) if self.since else 0
        counter = next((name for name in base if name.endswith(ARRIVED)), None)
        if counter is None or wanted <= int(base[counter]):
            return base, state
        layer = counter.removesuffix(ARRIVED)
        weight, bias = base[f"{layer}weight"].clone(), base.get(f"{layer}bias")
        first = len(weight) - self.new + int(base[counter])
        opened = slice(first, len(weight) - self.new + wanted)
        weight[opened] = weight[self.background]
        changed = {counter: torch.tensor(wanted), f"{layer}weight": weight}
        if bias is not None:
            bias = bias.clone()
            bias[self.background] -= math.log(wanted - int(base[counter]) + 1)
            bias[opened] = bias[self.background]
            changed[f"{layer}bias"] = bias
        return {**base, **changed}, state

    def export(self, model: nn.Module) -> nn.Module:
        """Cut off what was never announced."""
        for name, layer in list(model.named_modules()) if self.since else ():
            if hasattr(layer, ARRIVED):
                left = len(layer.weight) - self.new + int(getattr(layer, ARRIVED))
                model = _replaced(model, name, narrowed(layer, left))
        return model

    def loss(self, step: Step) -> Tensor:
        """See the class."""
        told = {"arrived": self.new, "known": 0}
        if self.since:
            told = step.plan.payload[self.name]
        if told["arrived"] == 0:
            return step.task.loss(step.outputs, step.targets)
        z, truth = scores.flatten(step.outputs, step.targets)
        before, _ = scores.flatten(step.base_outputs(), step.targets)
        old = z.shape[1] - self.new + told["known"]
        z_old = self._as_it_was(before, old)
        unlabelled = truth == self.background
        match self.keep:
            case "none":
                return F.cross_entropy(z, truth)
            case "kd":
                return F.cross_entropy(z, truth) + self.kd * distillation(z, z_old).mean()
            case "mib":
                return self._mib(z, z_old, truth, unlabelled)
        labelled = ~unlabelled
        loss = z.sum() * 0.0
        if labelled.any():
            loss = loss + F.cross_entropy(z[labelled], truth[labelled])
            loss = loss + self.kd * distillation(z[labelled], z_old[labelled]).mean()
        if unlabelled.any():
            loss = loss + self.ali * regulariser(z[unlabelled], z_old[unlabelled]).mean()
        return loss

    def _as_it_was(self, logits: Tensor, old: int) -> Tensor:
        """The base's logits over the old classes, for which new ones are background."""
        others = torch.cat([logits[:, self.background, None], logits[:, old:]], dim=1)
        out = logits[:, :old].clone()
        out[:, self.background] = others.logsumexp(dim=1)
        return out

    def _mib(self, z: Tensor, z_old: Tensor, truth: Tensor, unlabelled: Tensor) -> Tensor:
        old = z_old.shape[1]
        every = z.logsumexp(dim=1)
        known = z[:, :old].logsumexp(dim=1)
        own = z.gather(1, truth[:, None]).squeeze(1)
        entropy = (every - torch.where(unlabelled, known, own)).mean()
        log_q = self._as_it_was(z, old) - every[:, None]
        kept = -(z_old.softmax(dim=1) * log_q).mean(dim=1).mean()
        return entropy + self.kd * kept


def head_of(model: nn.Module, name: str, strategy: str) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The layer that gives the logits, and its name: the one that is meant, or the last linear one.

    Raises:
        ConfigInvalid: There is none.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    linear = [n for n, m in layers.items() if isinstance(m, nn.Linear)]
    found = name or (linear[-1] if linear else "")
    if found not in layers:
        raise ConfigInvalid(
            f'strategy {strategy}: the model has no layer "{found}" that could give logits; say its '
            f"name as head (there are {', '.join(layers) or 'none'})",
            key=f"strategy.{strategy}.head",
        )
    return found, layers[found]


def regulariser(z: Tensor, z_old: Tensor) -> Tensor:
    """ALI of each sample: logits over all classes (n, O + N) and of the base over the old (n, O)."""
    p = z_old.detach().softmax(dim=1)
    return z.logsumexp(dim=1) - (p * z[:, : p.shape[1]]).sum(dim=1)


def distillation(z: Tensor, z_old: Tensor) -> Tensor:
    """Cross-entropy to the base over the old classes, divided by their number, of each sample."""
    p = z_old.detach().softmax(dim=1)
    return -(p * z[:, : p.shape[1]].log_softmax(dim=1)).mean(dim=1)


def widened(
    layer: nn.Linear | nn.Conv2d, new: int, background: int, shared: bool = True
) -> nn.Linear | nn.Conv2d:
    """A layer with further outputs, copies of the background's.

    The old outputs keep their values but for the background's bias. A layer without biases keeps
    all logits as they are.

    Args:
        layer: The layer.
        new: How many.
        background: Which output is copied.
        shared: Whether the background shares what it had with them, by lower biases.
    """
    lowered = None if layer.bias is None else layer.bias.clone()
    if lowered is not None and shared:
        with torch.no_grad():
            lowered[background] -= math.log(new + 1)
    rows = torch.cat([torch.arange(len(layer.weight)), torch.full((new,), background)])
    return _with_outputs(layer, rows, lowered)


def narrowed(layer: nn.Linear | nn.Conv2d, left: int) -> nn.Linear | nn.Conv2d:
    """The first outputs of a layer, without what `Alife.build` registered with it."""
    return _with_outputs(layer, torch.arange(left), layer.bias)


def _with_outputs(
    layer: nn.Linear | nn.Conv2d, rows: Tensor, bias: Tensor | None
) -> nn.Linear | nn.Conv2d:
    out = copy.deepcopy(layer)
    with torch.no_grad():
        out.weight = nn.Parameter(layer.weight[rows].clone())
        if bias is not None:
            out.bias = nn.Parameter(bias[rows].clone())
    if isinstance(out, nn.Linear):
        out.out_features = len(rows)
    else:
        out.out_channels = len(rows)
    if hasattr(out, ARRIVED):
        delattr(out, ARRIVED)
        out._forward_hooks.clear()
    return out


def _closed(layer: nn.Module, inputs: Any, logits: Tensor, *, new: int) -> Tensor:
    """A forward hook: outputs of classes that did not arrive are far below all others."""
    dim = 1 if isinstance(layer, nn.Conv2d) else logits.dim() - 1
    first = logits.shape[dim] - new + int(getattr(layer, ARRIVED))
    opened = logits.narrow(dim, 0, first)
    rest = torch.full_like(logits.narrow(dim, first, logits.shape[dim] - first), CLOSED)
    return torch.cat([opened, rest], dim=dim)


def _replaced(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """The model with another module at a dotted name; the module itself for the empty name."""
    if not name:
        return layer
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)
    return model


def cayley(b: Tensor) -> Tensor:
    """Rotations from what is strictly above the diagonal, (…, d, d): R = (I - S)(I + S)^-1.

    S = (B - B^T) / 2 is skew, so I + S has an inverse, and R is orthogonal with determinant 1
    whatever B is: it can be learnt without a constraint.
    """
    upper = b.triu(1)
    skew = (upper - upper.mT) / 2
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    # (I - S) and (I + S)^-1 commute.
    rotation: Tensor = torch.linalg.solve(eye + skew, eye - skew)
    return rotation


def rotation_loss(
    b: Tensor, before: Tensor, now: Tensor, logits: Tensor, label: Tensor, share: float = 0.99
) -> Tensor:
    """What a class's rotation is trained with: (1 - share) CE + share (1 - cos), of each class.

    Args:
        b: (classes, d, d), as of `cayley`.
        before: Centred features of each class by the old extractor, (classes, d).
        now: The same by the new one.
        logits: Of the new classifier for the rotated features with the new mean added back,
            (classes, all classes).
        label: The classes, (classes,).
        share: lambda; 0.99, or 0.95 for VOC 15-5 and 19-1.
    """
    rotated = (cayley(b) @ before[..., None]).squeeze(-1)
    angle = 1 - F.cosine_similarity(rotated, now, dim=-1)
    return (1 - share) * F.cross_entropy(logits, label, reduction="none") + share * angle


_SITES = tuple(
    Site(f"site{k}", {"part": k, "parts": 3, "meets": meets})
    for k, meets in enumerate((True, True, False))
)


def _rates(seeds: Sequence[Seed], arm: str) -> tuple[float, float, float]:
    """Accuracy in per cent of old digits, of new ones, and of all."""
    old = mean(seeds, arm, "test.old")
    return (
        100 * mean(seeds, arm, "test.old_right") / old,
        100 * mean(seeds, arm, "test.new_right") / (1 - old),
        100 * mean(seeds, arm),
    )


def _holds(seeds: Sequence[Seed]) -> list[str]:
    if any("test.old" not in scores for seed in seeds for scores in seed.values()):
        return ["old and new classes were not told apart"]
    old, _, every = _rates(seeds, "alife")
    out = at_least("old classes", old, 85.0)
    out += at_least("100 - old classes, fine-tuned", 100 - _rates(seeds, "fine-tuned")[0], 95.0)
    out += at_least("100 - old classes, distilled", 100 - _rates(seeds, "distilled")[0], 30.0)
    return out + at_least("all classes over MiB", every - _rates(seeds, "mib")[2], -1.0)


ROW = Row(
    number=49,
    method="alife",
    claim="Classes that arrive where known ones are unlabelled don't cost the known ones.",
    control="fine-tuning, distillation, MiB; one of three sites never meets the new classes",
    data="D8, digits 0 to 4 known, 5 to 7 new",
    task="arrivals",
    sites=_SITES,
    run={
        "task": {"name": "arrivals"},
        "rounds": 4,
        "init": {"from": "task"},
        "cohort": {"sites": [s.name for s in _SITES], "quorum": "all", "deadline_s": 900.0},
        "local": {
            "work": {"epochs": 5},
            "batch_size": 32,
            "lr": 0.05,
            "optimizer": {"name": "sgd", "momentum": 0.9},
        },
        "assess": {"every": 1000},  # only the last round
    },
    arms={
        "alife": {"strategy": [{"name": "alife", "new": 3}]},
        "mib": {"strategy": [{"name": "alife", "new": 3, "keep": "mib"}]},
        "distilled": {"strategy": [{"name": "alife", "new": 3, "keep": "kd"}]},
        "fine-tuned": {"strategy": [{"name": "alife", "new": 3, "keep": "none"}]},
    },
    holds=_holds,
    reproduced="yes",
)
