"""Distillation at the sites in a real federation: what a site remembers survives its end, and stays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.views import Round
from tests.support.field import SITES, Field

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.timeout(300)]

HEAD = 12 * 12 + 12 + 12 * 6 + 6
GATE = 12 * 3 + 3 + 2 * 3 + 2 * 3
BRANCH = 12 * 3 + 3

# Strategy, and how many more floating-point values than without it a contribution has.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "srdl": ({}, 0),
    "self_distillation": ({"start": 1, "memory": 0.5}, 0),
    "seed": ({"queue": 300, "weight": 0.5}, HEAD),
    "one": ({"tail": "second", "ramp": 0.0, "exchange": "personal"}, GATE + BRANCH),
}


@pytest.fixture
def field(real: Field) -> Iterator[Field]:
    yield real
    real.clear()
    real.federation.await_sites(SITES)


def rounds_of(field: Field, run: str, count: int) -> list[Round]:
    view = field.federation.wait(run, 180)
    assert view.state == "finished", view.reason
    rounds = field.federation.rounds(run)
    assert [len(r.missing) for r in rounds] == [0] * count
    return rounds


def config(field: Field, name: str, rounds: int, strategy: list[dict[str, Any]]) -> dict[str, Any]:
    cohort = {"quorum": "all", "deadline_s": 120}
    return field.config(name, rounds=rounds, cohort=cohort, strategy=strategy)


@pytest.mark.parametrize("name", CASES)
def test_kill_and_resume_give_the_same_bits_and_nothing_more_is_sent(
    field: Field, name: str
) -> None:
    federation = field.federation
    params, more = CASES[name]
    strategy = [{"name": name, **params}]
    plain = federation.launch(config(field, f"{name}-plain", 1, []))
    straight = federation.launch(config(field, f"{name}-straight", 3, strategy))
    (bare,) = rounds_of(field, plain, 1)
    expected = rounds_of(field, straight, 3)
    for with_it, without in zip(expected[0].sites, bare.sites, strict=True):
        extra = with_it.sent_bytes - without.sent_bytes
        assert 4 * more <= extra <= 4 * more + 8, "only what is averaged travels (and a counter)"

    run = federation.launch(config(field, f"{name}-restarted", 2, strategy))
    rounds_of(field, run, 2)
    for site, restart in (("north", federation.stop_site), ("south", federation.kill)):
        restart(site)
        federation.start_site(site)
    federation.client.extend(run, 3)
    rounds = rounds_of(field, run, 3)
    assert [r.model for r in rounds] == [r.model for r in expected]
