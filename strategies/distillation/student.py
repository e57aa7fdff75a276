"""A smaller model for deployment, distilled in the same run from the averaged one or the sites'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor, nn

from protos.errors import TaskFailed
from protos.plan import Plan
from strategies.context import Refinement, Update, seeded
from strategies.distillation.ensemble import EnsembleDistillation, Teacher
from strategies.distillation.proxy import Source, proxy_of
from strategies.holdout import holdout
from strategies.protocol import Family, Need

WEIGHTS, FACTS = "student/student.safetensors", "student/student.json"


class Student(EnsembleDistillation):
    """A compact student of the federation, made while the federation trains.

    The task names the student's architecture (`Task.student`). With z_s its logits on a proxy
    sample, z_t those of the teacher (the averaged model, or the weighted ensemble of the sites'
    models as in ``feddf``), T the temperature, every round minimises::

        T^2 * KL( softmax(z_t / T) || softmax(z_s / T) )

    by Adam with a rate that falls to 0 along a cosine. The student of the last round is where the
    next one starts, so a round needs few steps. Weights are drawn once, by the run's seed.

    The average is not touched. Student and scores are kept with the round as files, and
    ``farflung export RUN DIR --of student`` gives them out: ``student.safetensors`` for
    `Task.student`, and ``student.json`` with how it was made.

    Degenerate case: ``steps = 0`` makes no student and asks the sites for nothing.

    Departures: the paper adds the loss of the labels; the orchestrator has none. T = 2 is a value of
    its range (1 to 20; small students do better with small T). Warm starts are ours.

    Attributes:
        proxy: Where the inputs come from: task, folder:/PATH, condensed, or generated.
        samples: At most so many of them, the first ones, >= 1.
        steps: Optimizer steps of a round, >= 0.
        learning_rate: Adam's at the first step of a round, > 0.
        batch_size: Proxy samples of a step, >= 1.
        temperature: T, > 0.
        patience: Stop after so many steps without gain on held-out proxy samples; 0 never stops.
        balance: Whether the sites' models, where they teach, are freed from the class frequencies of
            their sites, as in feddf.
        teacher: average, or the sites' models weighted as in feddf: uniform, count, calibration.
    """

    name: ClassVar[str] = "student"
    family: ClassVar[Family] = "distillation"
    summary: ClassVar[str] = "A smaller model for deployment learns from the average every round."
    paper: ClassVar[str] = (
        "after Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, "
        "arXiv:1503.02531"
    )
    needs: ClassVar[frozenset[Need]] = frozenset(
        {"proxy data", "student", "orchestrator task", "logits"}
    )
    degenerate: ClassVar[Mapping[str, Any]] = {"steps": 0}

    proxy: Source = "task"
    samples: int = Field(10_000, ge=1)
    steps: int = Field(500, ge=0)
    learning_rate: float = Field(3e-3, gt=0)
    batch_size: int = Field(128, ge=1)
    temperature: float = Field(2.0, gt=0)
    patience: int = Field(0, ge=0)
    balance: bool = True
    teacher: Teacher = "average"

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
        """Train the student for a round.

        Returns:
            ``share`` of the average's parameters that it has; ``agreement`` of its classes with
            the teacher's over the proxy samples; ``kl`` after training; ``steps``; weights of the
            teachers; and where the orchestrator's task has test data ``accuracy``, ``nll`` and
            ``ece`` of the student, and ``accuracy_lost`` against the average.

        Raises:
            TaskFailed: The task has no student, or one of other classes, the last round's does not fit it,
                there is no proxy data, or the loss is not finite (the rate is too high).
        """
        if self.steps == 0:
            return {}
        student = self._student(refinement).to(refinement.device)
        proxy = proxy_of(refinement, self.proxy, self.samples, self.batch_size, self.name)
        targets, report = self.teach(refinement, proxy, self.teacher)
        here, there = proxy.logits(student).shape[1], targets.shape[1]
        if here != there:
            raise TaskFailed(
                f"student: it tells {here} classes apart where the model has {there}; "
                "let the task's student() have as many",
                strategy=self.name,
            )
        student.train()
        made = self.train(student, refinement, proxy, targets)
        student.eval()
        logits = proxy.logits(student)
        agree = (logits.argmax(dim=1) == targets.argmax(dim=1)).double().mean()
        report |= {
            "share": parameters(student) / max(1, parameters(refinement.model)),
            "agreement": float(agree),
            "kl": self.gap(student, proxy, targets),
            "samples": float(proxy.size),
            "steps": float(made),
        }
        own, average = holdout(refinement, student, refinement.model.to(refinement.device))
        report |= {key: own[key] for key in ("accuracy", "nll", "ece") if key in own}
        if "accuracy" in own:
            report["accuracy_lost"] = average["accuracy"] - own["accuracy"]
        refinement.files[WEIGHTS] = save(
            {k: v.detach().cpu().contiguous() for k, v in tensors(student).items()}
        )
        facts = {"round": refinement.round, "parameters": parameters(student), "report": report}
        refinement.files[FACTS] = (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode()
        return report

    def _student(self, refinement: Refinement) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded(refinement.seed, self.name).initial_seed())
            student = refinement.task.student()
        if student is None:
            raise TaskFailed(
                "student: the orchestrator's task names no student; give it a method student()",
                strategy=self.name,
            )
        if (stored := refinement.files.get(WEIGHTS)) is not None:
            before, own = load(stored), tensors(student)
            if {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in own.items()}:
                raise TaskFailed(
                    "student: the task's student is another one than that of the last round",
                    strategy=self.name,
                )
            student.load_state_dict(before, strict=False)
        return student


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's state by name."""
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def parameters(model: nn.Module) -> int:
    """How many numbers a model's parameters are."""
    return sum(p.numel() for p in model.parameters())
