"""The methods that act on the local loss: FedProx, self-distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protos.plan import Plan, Schedule, TaskChoice, Work
from strategies.context import Step
from strategies.distillation.self_distillation import SelfDistillation
from strategies.distillation.softened import divergence
from strategies.local.fedprox import FedProx
from strategies.task import Task

# The logits of algorithms.md section 3: three branches and their gated ensemble.
Z = [torch.tensor([row], dtype=torch.float64) for row in ([2, 0, -1.0], [1, 1, 0.0], [0, 2, 0.0])]
GATE = torch.tensor([0.2, -0.5, 1.0], dtype=torch.float64).relu().softmax(dim=0)


def test_vector_of_the_divergence() -> None:
    ensemble = sum((g * z for g, z in zip(GATE, Z, strict=True)), torch.zeros(1, 3).double())
    assert [f"{v:.6f}" for v in ensemble[0].tolist()] == ["0.696969", "1.303031", "-0.247263"]
    total = sum(float(divergence(ensemble, z, 3.0)) for z in Z)
    assert f"{total:.6f}" == "0.921597"


def test_divergence_of_equals_is_zero_and_the_teacher_gets_no_gradient() -> None:
    teacher = torch.randn(4, 3, requires_grad=True)
    student = torch.randn(4, 3, requires_grad=True)
    assert float(divergence(teacher, teacher, 2.0).detach()) == pytest.approx(0, abs=1e-6)
    divergence(teacher, student, 2.0).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_gradient_of_the_divergence() -> None:
    """T (softmax(z / T) - softmax(z* / T)) / n."""
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    student.requires_grad_(True)
    divergence(teacher, student, 3.0).backward()
    expected = 3.0 * ((student / 3).softmax(1) - (teacher / 3).softmax(1)).detach() / 5
    torch.testing.assert_close(student.grad, expected)


def test_positions_count_as_samples() -> None:
    teacher, student = torch.randn(2, 2, 3, 5)
    by_hand = [divergence(teacher[..., k], student[..., k], 2.0) for k in range(5)]
    torch.testing.assert_close(divergence(teacher, student, 2.0), torch.stack(by_hand).mean())


def step(number: int = 2, **changes: Any) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    base = {name: value.detach() + 0.5 for name, value in model.state_dict().items()}
    plan = Plan(
        run="r",
        round=number,
        attempt=1,
        site="north",
        task=TaskChoice(name="t"),
        work=Work(epochs=1),
        schedule=Schedule(lr=0.1),
    )

    def base_model() -> nn.Module:
        teacher = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        teacher.load_state_dict(base)
        return teacher

    inputs = torch.randn(4, 2)
    fields: dict[str, Any] = {
        "plan": plan,
        "task": Task(),
        "model": model,
        "base": base,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "index": 0,
        "total": 1,
        "epoch": 0,
        "learning_rate": 0.1,
        "generator": torch.Generator(),
        "inputs": inputs,
        "targets": torch.tensor([0, 1, 0, 1]),
        "outputs": model(inputs),
        "base_model_factory": base_model,
    }
    return Step(**{**fields, **changes})


def zero() -> Tensor:
    return torch.zeros((), requires_grad=True)


def test_fedprox_squares_the_distance_over_parameters_only() -> None:
    """17 + 6 parameters, each 0.5 away: mu / 2 * 23 / 4."""
    found = FedProx(mu=0.1).objective(zero(), step(), {})
    assert sum(p.numel() for p in step().model.parameters()) == 23
    assert float(found.detach()) == pytest.approx(0.05 * 23 / 4, rel=1e-6)


def test_fedprox_pulls_towards_the_base() -> None:
    at = step()
    FedProx(mu=0.1).objective(zero(), at, {}).backward()
    for parameter in at.model.parameters():
        torch.testing.assert_close(parameter.grad, torch.full_like(parameter, 0.1 * -0.5))


def test_fedprox_leaves_out_what_is_not_shared() -> None:
    at = step()
    at.base = {name: value for name, value in at.base.items() if name.startswith("0.")}
    assert float(FedProx(mu=0.1).objective(zero(), at, {}).detach()) == pytest.approx(0.05 * 9 / 4)
    at.base = {}
    loss = zero()
    assert FedProx(mu=0.1).objective(loss, at, {}) is loss


def test_self_distillation_is_the_divergence_from_the_base() -> None:
    at = step(3)
    strategy = SelfDistillation(weight=0.5, temperature=2.0, start=2, ramp=1)
    found = strategy.objective(torch.tensor(1.0), at, {})
    expected = 1 + 0.5 * divergence(at.base_outputs(), at.outputs, 2.0)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None for p in at.base_model().parameters())
    assert not at.base_model().training


def test_the_teacher_comes_late_and_slowly() -> None:
    strategy = SelfDistillation(weight=0.6, start=3, ramp=3)
    found = [strategy.weight_in(number) for number in range(1, 8)]
    assert found == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.6, 0.6])
    loss = torch.tensor(1.0)
    assert strategy.objective(loss, step(2, base_model_factory=None), {}) is loss


def test_the_base_model_is_made_once_a_round() -> None:
    made = []

    def factory() -> nn.Module:
        made.append(1)
        return nn.Linear(2, 2)

    scratch: dict[str, Any] = {}
    for _ in range(3):
        step(base_model_factory=factory, scratch=scratch).base_outputs()
    assert len(made) == 1
    with pytest.raises(LookupError):
        step(base_model_factory=None).base_outputs()
