"""SEED: a large frozen teacher passes on to small students which samples are alike, without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from protos.errors import ConfigInvalid
from protos.manifest import Placement
from protos.plan import Plan
from strategies.context import Step, seeded
from strategies.distillation.graft import Tap, graft, pooled, width_out
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least, mean
from strategies.task import Task

NAME = "seed"


class SEED(Strategy):
    """Self-supervised distillation from a teacher that the federation holds.

    With z_s and z_t the embeddings of a sample by student (through a head) and teacher, divided by
    their L2 norms, and D the queue of the teacher's last embeddings at this site::

        p_t = softmax([z_t . z_t, z_t . D] / tau_t)
        p_s = softmax([z_s . z_t, z_s . D] / tau_s)
        L   = -mean over samples of  sum p_t log p_s
        loss = (1 - weight) * the task's loss + weight * L

    and z_t goes into D, over the oldest. Both see the same view of the sample.

    The teacher comes from `Task.teacher`; its tensors are placed ``frozen``: known by digest,
    fetched once by a site that has others, never in a contribution. So it is enough that whoever
    gives the first base (``init.from``) really has it. The queue is state of the site: it survives
    restarts and never leaves. Labels are not used with ``weight = 1``. ``farflung export``
    gives out the student without head and teacher. `probe` says how good its embeddings are.

    Degenerate case: ``weight = 0`` adds neither teacher nor head.

    Departures: each site has a queue of its own, where the reference code has one; it starts from
    normalised noise drawn for the site. tau_t is the paper's; the reference code has 1e-4, which
    agrees wherever cosines differ by much more than that. The variant with small patches is not
    here.

    Attributes:
        weight: Part of the distillation in the loss, in [0, 1].
        queue: K, embeddings that a site remembers, >= 1.
        tau_s: Temperature of the student, > 0.
        tau_t: Temperature of the teacher, > 0.
    """

    name: ClassVar[str] = NAME
    family: ClassVar[Family] = "distillation"
    summary: ClassVar[str] = "A frozen teacher's similarities train a small student, unlabelled."
    paper: ClassVar[str] = (
        "Fang, Wang, Wang, Zhang, Yang, Liu: SEED: Self-supervised Distillation for Visual "
        "Representation, ICLR 2021, arXiv:2101.04731"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"embedding", "teacher", "our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"weight": 0.0}

    weight: float = Field(1.0, ge=0, le=1)
    queue: int = Field(65_536, ge=1)
    tau_s: float = Field(0.2, gt=0)
    tau_t: float = Field(0.01, gt=0)

    def build(self, model: nn.Module, task: Task) -> nn.Module:
        """Put teacher and head beside the layer that embeds.

        Raises:
            ConfigInvalid: The task has no teacher, or does not name the layer that embeds.
        """
        if self.weight == 0:
            return model
        teacher = task.teacher()
        if teacher is None or not task.embedding:
            lacking = "teacher() gives none" if teacher is None else "embedding names no layer"
            raise ConfigInvalid(
                f"strategy seed: the task's {lacking}; it needs both", key="strategy.seed"
            )
        own, theirs = width_out(model, NAME, task.embedding), width_out(teacher, NAME)
        graft(model, task.embedding, lambda body: Student(body, teacher, own, theirs), NAME)
        return model

    def placement(self) -> Mapping[str, Placement]:
        """The teacher is frozen, with its statistics."""
        return {"*seed_teacher.*": "frozen"} if self.weight else {}

    def batch(self, step: Step) -> None:
        """Say that the next forward pass is the step's."""
        if self.weight:
            student_of(step.model).found.open = True

    def objective(self, loss: Tensor, step: Step, state: dict[str, Tensor]) -> Tensor:
        """Mix in the distillation."""
        if self.weight == 0:
            return loss
        student = student_of(step.model)
        z_s = normalised(student.head(pooled(student.found.take())))
        with torch.no_grad():
            z_t = normalised(student.seed_teacher(step.inputs))
        step.scratch["seed.embeddings"] = z_t
        queue = self._queue(state, step.plan, z_t)["queue"].to(z_t)
        distilled = similarity_loss(z_s, z_t, queue, self.tau_s, self.tau_t)
        return distilled if self.weight == 1 else (1 - self.weight) * loss + self.weight * distilled

    def after_step(self, step: Step, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put the teacher's embeddings of this step into the queue."""
        z_t = step.scratch.pop("seed.embeddings", None)
        if z_t is None:
            return state
        return enqueue(self._queue(state, step.plan, z_t), z_t)

    def _queue(self, state: dict[str, Tensor], plan: Plan, like: Tensor) -> dict[str, Tensor]:
        """The state, or noise where there is none of this size: queue (K, features), next (,)."""
        shape = (self.queue, like.shape[1])
        if state and state["queue"].shape == shape:
            return state
        noise = torch.randn(shape, generator=seeded(plan.seed, plan.site, NAME))
        return {"queue": normalised(noise).to(like), "next": torch.zeros((), dtype=torch.int64)}

    def export(self, model: nn.Module) -> nn.Module:
        """Take teacher and head away."""
        for path, module in list(model.named_modules()):
            if isinstance(module, Student):
                graft(model, path, lambda student: cast(Student, student).body, NAME)
        return model


class Student(nn.Module):
    """The layer that embeds, with the head that leads to the teacher's space, and the teacher.

    Attributes:
        body: The layer that was there.
        head: Two layers, as wide as the student's embedding; from it to the teacher's.
        seed_teacher: Always in evaluation mode.
        found: The embeddings of the last pass in training.

    Args:
        body: Its output is (n, own, …).
        teacher: Inputs to embeddings (n, theirs).
        own: Width of the student's embedding.
        theirs: Width of the teacher's.
    """

    def __init__(self, body: nn.Module, teacher: nn.Module, own: int, theirs: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(own, own), nn.ReLU(), nn.Linear(own, theirs))
        self.seed_teacher = teacher.eval().requires_grad_(False)
        self.body = body
        self.found = Tap()

    def forward(self, inputs: Tensor) -> Tensor:
        """The body's output."""
        embeddings = self.body(inputs)
        if self.training and self.found.open:
            self.found.put(embeddings)
        return cast(Tensor, embeddings)

    def train(self, mode: bool = True) -> Student:
        """The teacher is never in training mode."""
        super().train(mode)
        self.seed_teacher.eval()
        return self


def student_of(model: nn.Module) -> Student:
    """The grafted layer in a model."""
    return next(m for m in model.modules() if isinstance(m, Student))


def normalised(embeddings: Tensor) -> Tensor:
    """Rows divided by their L2 norms."""
    return F.normalize(embeddings, dim=1)


def similarity_loss(z_s: Tensor, z_t: Tensor, queue: Tensor, tau_s: float, tau_t: float) -> Tensor:
    """Cross-entropy between the similarities that teacher and student see, mean over samples.

    Args:
        z_s: The student's embeddings, (n, d), of norm 1.
        z_t: The teacher's; they get no gradient.
        queue: (K, d), of norm 1; no gradient.
        tau_s: The student's temperature.
        tau_t: The teacher's temperature.
    """
    z_t, queue = z_t.detach(), queue.detach()

    def similarities(z: Tensor) -> Tensor:
        return torch.cat([(z * z_t).sum(dim=1, keepdim=True), z @ queue.T], dim=1)

    p_t = (similarities(z_t) / tau_t).softmax(dim=1)
    log_p_s = (similarities(z_s) / tau_s).log_softmax(dim=1)
    return -(p_t * log_p_s).sum(dim=1).mean()


def enqueue(state: Mapping[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """Write (n, d) rows over the oldest of the queue, round and round; of more than K the last K.

    The queue, which may be large, is changed in place.
    """
    queue, start = state["queue"].to(new), int(state["next"])
    size = len(queue)
    rows = new.detach()[-size:]
    skipped = len(new) - len(rows)
    places = (start + skipped + torch.arange(len(rows), device=queue.device)) % size
    queue[places] = rows
    return {"queue": queue, "next": torch.tensor((start + len(new)) % size)}


def _holds(seeds: Sequence[Seed]) -> list[str]:
    probe = {arm: 100 * mean(seeds, arm, "test.linear_probe") for arm in ROW.arms}
    out = at_least("SEED over a student by SimCLR, points", probe["seed"] - probe["simclr"], 8.0)
    out += at_least(
        "SEED over an untrained student, points", probe["seed"] - probe["untrained"], 8.0
    )
    return out


ROW = Row(
    number=23,
    method=NAME,
    claim="A small student learns more from a large frozen teacher than from contrasts of its own.",
    control="the same student by SimCLR, and untrained; embeddings are probed linearly (5 folds, 400 labels)",
    data="M5",
    task="views",
    sites=(
        *(Site(f"site{k}", {"part": k, "parts": 3}) for k in range(3)),
        Site("archive", {"lends": True}),
    ),
    run={
        "rounds": 4,
        "task": {"name": "views"},
        "init": {"from": "site:archive"},
        "cohort": {"sites": ["site0", "site1", "site2"], "quorum": "all", "deadline_s": 900.0},
        "local": {
            "work": {"epochs": 20},
            "lr": 0.001,
            "batch_size": 64,
            "optimizer": {"name": "adam"},
        },
        "assess": {"every": 1000},
    },
    arms={
        "untrained": {
            "strategy": [],
            "rounds": 1,
            "task": {"params": {"views": 1}},
            "local": {"work": {"epochs": 1}},
        },
        "simclr": {"strategy": []},
        "seed": {"strategy": [{"name": NAME, "queue": 512}], "task": {"params": {"views": 1}}},
    },
    holds=_holds,
    reproduced="yes",
)
