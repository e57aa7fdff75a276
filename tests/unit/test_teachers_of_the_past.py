"""Teachers that a site keeps of earlier rounds: SRDL, self-distillation with memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from protos.plan import OptimizerChoice, Schedule, StrategyChoice, Work
from strategies.context import Draft, RoundSummary
from strategies.distillation.self_distillation import SelfDistillation
from strategies.distillation.softened import divergence
from strategies.distillation.srdl import SRDL
from strategies.schedule import learning_rate
from tests.support.distilling import Deep, built, step_of, went
from tests.support.little_federation import LittleFederation


def draft(number: int) -> Draft:
    return Draft(
        round=number, rounds=4, last=RoundSummary(), cohort=("north",), work=Work(epochs=1),
        schedule=Schedule(lr=0.2), optimizer=OptimizerChoice(), batch_size=8,
    )  # fmt: skip


def test_the_rate_falls_to_its_floor_in_a_stage_and_starts_anew() -> None:
    for number in (1, 2):
        schedule = SRDL(decay=0.001).plan(draft(number), {})[0].schedule
        assert learning_rate(schedule, 0) == 0.2
        assert learning_rate(schedule, 0.5) == pytest.approx(0.2 * (1 + 0.001) / 2)
        assert learning_rate(schedule, 1) == pytest.approx(0.2 * 0.001)


def test_the_first_base_of_stage_two_is_kept_and_teaches_to_the_end() -> None:
    strategy = SRDL(start=2)
    step = step_of("srdl", built(strategy), 1)
    base, state = strategy.adopt(dict(step.base), {}, step.plan)
    assert state == {}
    assert went(strategy, step, state).equal(step.task.loss(step.outputs, step.targets))
    second = step_of("srdl", built(strategy), 2)
    _, state = strategy.adopt(dict(second.base), state, second.plan)
    assert state.keys() == base.keys()
    third = step_of("srdl", built(strategy), 3)
    later = {name: value + 1 for name, value in third.base.items()}
    _, after = strategy.adopt(later, state, third.plan)
    assert all(torch.equal(after[name], value) for name, value in state.items())
    found = went(strategy, third, after)
    teacher = Deep().model()
    teacher.load_state_dict(state)
    expected = third.task.loss(third.outputs, third.targets) + divergence(
        teacher.eval()(third.inputs), third.outputs, 3.0
    )
    torch.testing.assert_close(found, expected)
    found.backward()
    frozen = third.scratch["srdl.teacher"]
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())


def test_a_random_restart_draws_new_weights_the_same_everywhere_once() -> None:
    strategy = SRDL(restart="random")
    found = []
    for site in ("north", "south"):
        step = step_of("srdl", built(strategy), 2, restart="random")
        step.plan = step.plan.model_copy(update={"site": site})
        step.model(step.inputs).sum().backward()
        step.optimizer.step()
        before = {name: value.clone() for name, value in step.model.state_dict().items()}
        strategy.batch(step)
        assert not step.optimizer.state, "momentum of weights that are gone"
        found.append({name: value.clone() for name, value in step.model.state_dict().items()})
        assert not any(torch.equal(found[-1][name], value) for name, value in before.items())
        strategy.batch(replace(step, index=1))
        assert all(torch.equal(found[-1][n], v) for n, v in step.model.state_dict().items())
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_what_was_kept_stays_home() -> None:
    federation = LittleFederation([StrategyChoice(name="srdl")]).run(1)
    base = {name: value.clone() for name, value in federation.model.items()}
    federation.run(2)
    for site, state in federation.state.items():
        assert all(torch.equal(state["srdl"][name], value) for name, value in base.items())
        assert not federation.payloads[site]


# ----------------------------------------------------------------- self-distillation with memory


def test_a_teacher_with_memory_is_the_running_mean_of_the_bases() -> None:
    strategy = SelfDistillation(memory=0.75, start=1, ramp=1)
    step = step_of("self_distillation", built(strategy), 1)
    state: dict[str, Tensor] = {}
    for factor in (1.0, 5.0):
        base = {name: factor * value for name, value in step.base.items()}
        adopted, state = strategy.adopt(base, state, step.plan)
        assert adopted is base
    for name, value in step.base.items():
        torch.testing.assert_close(state[name], 0.75 * value + 0.25 * 5 * value)
    found = went(strategy, step, state)
    teacher = Deep().model()
    teacher.load_state_dict(state)
    expected = step.task.loss(step.outputs, step.targets) + 0.5 * divergence(
        teacher(step.inputs), step.outputs, 3.0
    )
    torch.testing.assert_close(found, expected)
