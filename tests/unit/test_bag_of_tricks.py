"""Each trick has an exact test of its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protos.errors import ConfigInvalid
from protos.plan import OptimizerChoice, Plan, Schedule, TaskChoice, Work
from strategies.context import Draft, RoundSummary, Step, seeded
from strategies.recipes.bag_of_tricks import FLOOR, BagOfTricks, spare_vectors
from strategies.schedule import learning_rate
from strategies.task import Task

OFF = dict(BagOfTricks.degenerate or {})


def only(**on: Any) -> BagOfTricks:
    """One trick, the others switched off."""
    return BagOfTricks(**{**OFF, **on})


def draft(round: int = 1, rounds: int = 120, batch_size: int = 64) -> Draft:
    return Draft(
        round=round,
        rounds=rounds,
        last=RoundSummary(),
        cohort=("a",),
        work=Work(epochs=1),
        schedule=Schedule(lr=0.1),
        optimizer=OptimizerChoice(),
        batch_size=batch_size,
    )


def step(round: int = 1, index: int = 0, total: int = 10, weight_decay: float = 0.0) -> Step:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    plan = Plan(
        run="r", round=round, attempt=1, site="a", task=TaskChoice(name="t"), stack=(),
        work=Work(epochs=1), schedule=Schedule(lr=0.4), batch_size=8, seed=0,
    )  # fmt: skip
    return Step(
        plan=plan,
        task=Task(),
        model=model,
        base={},
        optimizer=torch.optim.SGD(model.parameters(), lr=0.4, weight_decay=weight_decay),
        index=index,
        total=total,
        epoch=0,
        learning_rate=0.4,
        generator=seeded(1, index),
        inputs=torch.randn(8, 4),
        targets=torch.arange(8) % 3,
    )


def rate_of(given: Step) -> float:
    (rate,) = {group["lr"] for group in given.optimizer.param_groups}
    assert rate == given.learning_rate
    return float(rate)


def test_linear_scaling() -> None:
    assert only(reference=256).plan(draft(batch_size=64), {})[0].schedule.lr == 0.1 * 64 / 256
    assert only().plan(draft(batch_size=64), {})[0].schedule.lr == 0.1


def test_the_rate_climbs_to_its_peak_over_the_first_steps_of_the_run_only() -> None:
    """m = 25 steps: two and a half rounds of ten."""
    seen = []
    for round in (1, 2, 3, 4):
        for index in range(10):
            given = step(round, index)
            only(warm_up=2.5).batch(given)
            seen.append(rate_of(given))
    assert seen[:25] == pytest.approx([0.4 * i / 25 for i in range(1, 26)], rel=1e-12)
    assert seen[24:] == [0.4] * 16


def test_step_and_cosine() -> None:
    for round, expected in ((1, 0.1), (30, 0.1), (31, 0.01), (60, 0.01), (61, 1e-3), (91, 1e-4)):
        schedule = only(schedule="step").plan(draft(round), {})[0].schedule
        assert learning_rate(schedule, 0.5) == pytest.approx(expected, rel=1e-12)
    schedule = only(schedule="cosine").plan(draft(), {})[0].schedule
    for u in (0.0, 0.25, 0.5, 1.0):
        cosine = 0.1 * (1 + math.cos(math.pi * u)) / 2
        assert learning_rate(schedule, u) == pytest.approx(cosine, abs=0.1 * FLOOR)


def test_no_vector_is_decayed() -> None:
    given = step(weight_decay=1e-4)
    only(no_bias_decay=True).batch(given)
    decayed, spared = given.optimizer.param_groups
    assert decayed["weight_decay"] == 1e-4
    assert spared["weight_decay"] == 0
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    kept = {id(p) for group in (decayed, spared) for p in group["params"]}
    assert kept == {id(p) for p in given.model.parameters()}
    spare_vectors(given.optimizer)  # the next round has a fresh optimizer, but twice does no harm
    assert len(given.optimizer.param_groups) == 2
    for parameter in given.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {n: p.detach().clone() for n, p in given.model.named_parameters()}
    given.optimizer.step()
    moved = {n for n, p in given.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"0.weight", "2.weight"}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return x + out


def test_zero_gamma_makes_the_block_an_identity() -> None:
    x = torch.randn(2, 3, 5, 5)
    model = nn.Sequential(Block(), Block())
    assert not torch.equal(model(x), x)
    assert torch.equal(only(zero_gamma="*.bn2").build(model, Task())(x), x)
    with pytest.raises(ConfigInvalid, match=r'zero_gamma = "\*.bn7" is the name of no layer'):
        only(zero_gamma="*.bn7").build(model, Task())


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_label_smoothing_spreads_over_the_other_classes(classes: int) -> None:
    epsilon = 0.1
    given = step()
    given.outputs = torch.randn(8, classes, dtype=torch.float64)
    given.targets = torch.arange(8) % classes
    q = torch.full((8, classes), epsilon / (classes - 1), dtype=torch.float64)
    q[torch.arange(8), given.targets] = 1 - epsilon
    assert torch.allclose(q.sum(1), torch.ones(8, dtype=torch.float64))
    expected = -(q * given.outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(only(smoothing=epsilon).loss(given), expected)

    # At the best gap the gradient is nought.
    gap = math.log((classes - 1) * (1 - epsilon) / epsilon)
    z = torch.zeros(1, classes, dtype=torch.float64)
    z[0, 1] = gap
    given.outputs, given.targets = z.requires_grad_(), torch.tensor([1])
    only(smoothing=epsilon).loss(given).backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert float(z.grad.abs().max()) < 1e-15


def test_mixup_blends_inputs_and_labels_alike() -> None:
    given = step()
    before = given.inputs.clone()
    trick = only(mixup=0.2, smoothing=0.1)
    trick.batch(given)
    mixture = given.scratch[trick.name]
    blended = mixture.share * before + (1 - mixture.share) * before[mixture.partner]
    assert torch.equal(given.inputs, blended)
    labels = F.one_hot(given.targets, 3).double()
    soft = mixture.share * labels + (1 - mixture.share) * labels[mixture.partner]
    soft = 0.9 * soft + 0.05 * (1 - soft)  # smoothing: 0.9 for a label, 0.05 for the two others
    assert torch.allclose(soft.sum(1), torch.ones(8, dtype=torch.float64))
    given.outputs = torch.randn(8, 3, dtype=torch.float64)
    expected = -(soft * given.outputs.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(trick.loss(given), expected)
