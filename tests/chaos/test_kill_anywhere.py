"""A seeded sample of `make kill-anywhere`: one kill in a round changes no bit of any model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.kill_anywhere import PER_STEP_S, Arena, Case, groups_of
from tests.support.field import SITES, Field


@pytest.fixture
def field(real: Field) -> Iterator[Field]:
    yield real
    real.federation.revive()
    real.clear()
    real.federation.await_sites(SITES)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(240)
def test_a_link_and_a_trainer_that_are_killed_in_a_round_change_no_bit(field: Field) -> None:
    """The daemon is killed in tests/integration/test_rounds.py, and in the slow test below."""
    arena = Arena(field, seed=1, rounds=3)
    reached = arena.cases("large")
    assert len({case.at for case in reached}) >= 100
    group = [
        arena.draw.choice([case for case in reached if case.process == process])
        for process in ("link", "trainer")
    ]
    (results,) = arena.disturb([group])
    assert [(r.name, r.struck, r.identical, r.why) for r in results] == [
        (case.name, True, True, "") for case in group
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sample_of_kills_changes_no_bit_and_costs_a_step_each(tmp_path: Path) -> None:
    field = Field(tmp_path / "f", trainer={"checkpoint": PER_STEP_S})
    with field.federation:
        arena = Arena(field, seed=2)
        reached = arena.cases("large")
        cases = [
            case
            for process, count in (("link", 5), ("trainer", 4), ("daemon", 3))
            for case in arena.draw.sample([c for c in reached if c.process == process], count)
        ]
        cases += [Case("trainer", "train.stepped"), Case("link", "a random moment")]
        left = list(cases)
        while left:
            batch = groups_of(left, 6, set())
            for results in arena.disturb(batch):
                assert [(r.name, r.why) for r in results if not r.identical] == []
                done = {result.name for result in results}
                left = [case for case in left if case.name not in done]
        assert arena.again <= arena.kills * len(SITES)  # a step of each site at most
