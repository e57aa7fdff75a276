"""Samples of `make kill-anywhere`: kills change no bit of any model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.arena import STEPS, Arena, Seen
from tests.chaos.cases import MOMENT, Case, Shape
from tests.chaos.kill_anywhere import SHAPES, ground
from tests.chaos.scenes import SCENES, Stage
from tests.support.field import SITES, Field

ANYWHERE = {
    "link": ("outbox.synced", "outbox.renamed", "contribute.sent", "fetch.chunk.written"),
    "trainer": ("train.stepped", "payload.written", "prepare.told", "perform.done"),
}
"""Some points that every round of a large model gets to."""


@pytest.fixture
def field(real: Field) -> Iterator[Field]:
    yield real
    real.federation.revive()
    real.clear()
    real.federation.await_sites(SITES)


@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(600)
def test_links_and_a_trainer_that_are_killed_in_a_run_change_no_bit(field: Field) -> None:
    """A daemon is killed in tests/integration/test_rounds.py, and in the slow test below."""
    draw = random.Random(3)
    cases = [Case("trainer", draw.choice(ANYWHERE["trainer"]), "large")]
    cases += [Case("link", at, "large") for at in draw.sample(ANYWHERE["link"], 2)]
    arena = Arena(
        field,
        {"large": Shape(30_000, 2)},
        known={"large": Seen({}, [], [], 1.0)},
        interval=STEPS,  # of these sites, which save no training that takes less than a second
    )
    came = arena.disturb(cases, seed=11)
    assert came.problem == ""
    assert {case.name for case in came.struck} == {case.name for case in cases}
    assert came.kills == len(cases)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sample_of_kills_changes_no_bit_and_costs_a_step_each(tmp_path: Path) -> None:
    with ground(tmp_path / "ground") as field:
        arena = Arena(field, {"large": Shape(30_000, 8)}, seed=2)
        reached = arena.cases("large")
        assert len({case.at for case in reached}) >= 100
        cases = [
            case
            for process, count in (("link", 8), ("trainer", 6), ("daemon", 6))
            for case in arena.draw.sample([c for c in reached if c.process == process], count)
        ]
        cases += [
            Case(process, MOMENT, "large", number=n)
            for n, process in enumerate(("daemon", "link", "trainer"))
        ]
        came = arena.disturb(cases, seed=12)
        assert came.problem == ""
        assert len(came.struck) >= 15


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_that_take_a_scene_change_no_bit(tmp_path: Path) -> None:
    """Work that is refused, late, stopped or cut short, lines that break, and a site that joins."""
    with ground(tmp_path / "ground", lines=True) as field:
        stage = Stage(field, dict(SHAPES), seed=3)
        for number, shape in enumerate(SCENES):
            came = stage.disturb(stage.cases(shape), seed=13 + number)
            assert came.problem == ""
            assert came.missed == []
