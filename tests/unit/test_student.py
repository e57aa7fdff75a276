"""The student: a smaller model that is distilled round by round and kept beside the average."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from protos.errors import TaskFailed
from strategies.distillation.student import FACTS, WEIGHTS, Student
from tests.support.refinements import Proxy, refinement, site_state


class Narrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 1), nn.Linear(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh())


class WithStudent(Proxy):
    def student(self) -> nn.Module:
        return Narrow()

    def test_data(self) -> Dataset[Any] | None:
        inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
        return TensorDataset(inputs, torch.arange(30) % 3)


def test_it_learns_and_the_average_stays_as_it_is() -> None:
    at = refinement(WithStudent())
    before = {k: v.clone() for k, v in at.model.state_dict().items()}
    few = Student(steps=1).refine(refinement(WithStudent()))
    report = Student(steps=200, learning_rate=0.03).refine(at)
    assert all(torch.equal(v, before[k]) for k, v in at.model.state_dict().items())
    assert report["kl"] < few["kl"] / 2
    assert report["share"] == (4 + 1 + 3 + 3) / 15
    student = Narrow()
    student.load_state_dict(load(at.files[WEIGHTS]))
    inputs, targets = WithStudent().test_data().tensors  # type: ignore[union-attr]
    with torch.no_grad():
        right = (student(inputs).argmax(1) == targets).double().mean().item()
        average = (at.model(inputs).argmax(1) == targets).double().mean().item()
    assert report["accuracy"] == pytest.approx(right)
    assert report["accuracy_lost"] == pytest.approx(average - right)
    assert json.loads(at.files[FACTS]) == {"round": 3, "parameters": 11, "report": report}


def test_a_round_starts_where_the_last_one_ended() -> None:
    files: dict[str, bytes] = {}
    reports = [Student(steps=20).refine(refinement(WithStudent(), files=files)) for _ in range(4)]
    gaps = [report["kl"] for report in reports]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0]


def test_the_sites_models_may_teach_it() -> None:
    """The mean of linear models is the model of the mean: both teachers say the same."""
    files: list[dict[str, bytes]] = [{}, {}]
    by_average = Student(steps=5).refine(refinement(WithStudent(), files=files[0]))
    ensemble = Student(steps=5, teacher="uniform", balance=False)
    by_sites = ensemble.refine(refinement(WithStudent(), files=files[1]))
    assert by_sites["kl"] == pytest.approx(by_average["kl"], abs=1e-5)
    assert by_sites["teacher.east"] == pytest.approx(1 / 3)
    assert "teacher.east" not in by_average


def test_same_seed_same_bits_whatever_the_global_generator_does() -> None:
    first, second = refinement(WithStudent()), refinement(WithStudent())
    Student(steps=5).refine(first)
    torch.manual_seed(99)
    Student(steps=5).refine(second)
    assert first.files[WEIGHTS] == second.files[WEIGHTS]


def test_it_says_what_is_missing() -> None:
    with pytest.raises(TaskFailed, match="names no student"):
        Student(steps=1).refine(refinement())
    at = refinement(WithStudent())
    Student(steps=1).refine(at)

    class Another(WithStudent):
        def student(self) -> nn.Module:
            return nn.Linear(4, 3)

    with pytest.raises(TaskFailed, match="another one than that of the last round"):
        Student(steps=1).refine(refinement(Another(), files=dict(at.files)))

    class OfMoreClasses(WithStudent):
        def student(self) -> nn.Module:
            return nn.Linear(4, 5)

    with pytest.raises(TaskFailed, match="5 classes apart where the model has 3"):
        Student(steps=1).refine(refinement(OfMoreClasses()))


def test_no_steps_keep_nothing() -> None:
    at = refinement(WithStudent())
    assert Student(steps=0).refine(at) == {}
    assert at.files == {}
    assert site_state("east").keys() == {"weight", "bias"}
