from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.plan import OptimizerChoice, Schedule, Work
from strategies.averaging.co_learning import CoLearning
from strategies.context import Draft, Memo, RoundSummary
from strategies.recipes.global_decay import GlobalDecay
from strategies.schedule import learning_rate


def draft(number: int, delta: float = math.nan, work: Work | None = None) -> Draft:
    return Draft(
        round=number,
        rounds=12,
        last=RoundSummary(round=number - 1, relative_change=delta),
        cohort=("north", "south"),
        work=work or Work(epochs=5),
        schedule=Schedule(lr=0.3),
        optimizer=OptimizerChoice(),
        batch_size=64,
    )


def epochs(strategy: CoLearning, deltas: list[float], first: float = 5) -> list[float]:
    """Local epochs of rounds 1, 2, …; ``deltas`` are those of the rounds before each."""
    memo: Memo = strategy.init_memo()
    out = []
    for number, delta in enumerate([math.nan, *deltas], start=1):
        planned, memo = strategy.plan(draft(number, delta, Work(epochs=first)), memo)
        assert planned.work.epochs is not None
        out.append(planned.work.epochs)
    return out


def test_rate_restarts_every_round_and_ends_at_its_decayed_value() -> None:
    for number in (1, 2, 7):
        planned, _ = CoLearning(decay=0.25).plan(draft(number), {})
        assert learning_rate(planned.schedule, 0.0) == 0.3
        assert learning_rate(planned.schedule, 1.0) == pytest.approx(0.3 * 0.25, abs=1e-15)


def test_epochs_double_when_the_model_settles() -> None:
    strategy = CoLearning(epsilon=0.05)
    assert epochs(strategy, [0.2, 0.05, 0.0501, 0.01, 0.01, 0.01, 0.01]) == [
        5, 5, 10, 10, 20, 40, 40, 40,
    ]  # fmt: skip


@given(
    deltas=st.lists(st.floats(0, 1) | st.just(math.nan), max_size=20),
    epsilon=st.floats(0, 1),
    factor=st.floats(1, 4),
    cap=st.floats(1, 100),
    first=st.floats(0.1, 50),
)
def test_growth_is_as_the_formula_says(
    deltas: list[float], epsilon: float, factor: float, cap: float, first: float
) -> None:
    strategy = CoLearning(epsilon=epsilon, factor=factor, max_epochs=cap)
    found = epochs(strategy, deltas, first)
    assert found[0] == first
    for before, after, delta in zip(found[:-1], found[1:], deltas, strict=True):
        grown = max(before, min(factor * before, cap))
        assert after == (grown if delta <= epsilon else before)
        assert after <= max(cap, first)


def test_a_second_attempt_does_not_grow_again() -> None:
    strategy = CoLearning(epsilon=1.0)
    _, memo = strategy.plan(draft(1), {})
    once, after = strategy.plan(draft(2, 0.1), memo)
    assert (once.work.epochs, after["grown"]) == (10, True)
    for known in (memo, after):
        again, _ = strategy.plan(draft(2, 0.1), known)
        assert again == once


def test_an_abandoned_round_is_not_judged() -> None:
    """Rounds 2 and 3 were planned, but round 1 is the last that was committed."""
    strategy = CoLearning(epsilon=1.0)
    _, memo = strategy.plan(draft(1), {})
    _, memo = strategy.plan(draft(2, 0.1), memo)
    third = draft(3).but(last=RoundSummary(round=1, relative_change=0.1))
    planned, _ = strategy.plan(third, memo)
    assert planned.work.epochs == 10


def test_a_late_phase_starts_from_its_first_epochs() -> None:
    planned, memo = CoLearning(epsilon=1.0).plan(draft(6, 0.001), {})
    assert planned.work.epochs == 5
    assert memo["judged"] == 5


@pytest.mark.parametrize("work", [Work(steps=10), Work(tokens=100), Work(seconds=1.5)])
def test_other_work_only_gets_the_cycle(work: Work) -> None:
    planned, memo = CoLearning(epsilon=1.0).plan(draft(2, 0.0, work), {})
    assert planned.work == work
    assert memo == {}
    assert planned.schedule.decay == 0.25


def test_without_decay_and_growth_the_draft_is_untouched() -> None:
    strategy = CoLearning(decay=1.0, factor=1.0, epsilon=1.0)
    _, memo = strategy.plan(draft(1), {})
    second = draft(2, 0.0)
    assert strategy.plan(second, memo)[0] == second


def test_a_global_decay_has_no_jumps() -> None:
    strategy = GlobalDecay(decay=0.05)
    pieces = [strategy.plan(draft(n), {})[0].schedule for n in range(1, 13)]
    assert learning_rate(pieces[0], 0.0) == 0.3
    for before, after in pairwise(pieces):
        assert learning_rate(before, 1.0) == pytest.approx(learning_rate(after, 0.0), rel=1e-12)
    assert learning_rate(pieces[-1], 1.0) == pytest.approx(0.3 * 0.05, rel=1e-12)
