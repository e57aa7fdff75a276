"""A site that is slower than the deadline: what it has then counts in the next round, weighed by its age."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.cli.tables import notes
from orchestrator.views import Round
from tests.support.field import ORCHESTRATOR, SITES, Field

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(400), pytest.mark.slow]

STEPS = 40


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """A federation that keeps every contribution, and whose trainers are warm."""
    retention = {"contributions": "all", "models": "all"}
    field = Field(tmp_path_factory.mktemp("stale"), daemon={"retention": retention})
    with field.federation:
        warm = field.federation.launch(config(field, "warm", rounds=1, deadline_s=120))
        assert field.federation.wait(warm, 180).state == "finished"
        yield field


@pytest.fixture
def field(keeping: Field) -> Iterator[Field]:
    keeping.clear()
    yield keeping
    keeping.clear()
    keeping.federation.revive()
    keeping.federation.await_sites(SITES)


def config(field: Field, name: str, rounds: int, **more: Any) -> dict[str, Any]:
    work = {"work": {"steps": STEPS}, "batch_size": 20, "lr": 0.1}
    strategy, hidden = more.pop("strategy", []), more.pop("hidden", 12)
    cohort = {"quorum": 2, "deadline_s": 5, **more}
    task = {"name": "blobs", "params": {"hidden": hidden}}
    return field.config(
        name, rounds=rounds, task=task, cohort=cohort, local=work, strategy=strategy
    )


def slow_down(field: Field, site: str, seconds: float) -> None:
    (field.switches[site] / "slow").write_text(str(seconds / STEPS))


def finished(field: Field, run: str) -> dict[int, Round]:
    view = field.federation.wait(run, 360)
    assert view.state == "finished", view.reason
    return {r.round: r for r in field.federation.rounds(run) if r.round}


def from_rounds(rounds: dict[int, Round], site: str) -> dict[int, int]:
    """In which round work for which earlier one counts."""
    rows = {number: {row.site: row for row in r.sites}[site] for number, r in rounds.items()}
    return {number: row.from_round for number, row in rows.items() if row.from_round}


def holds(field: Field, run: str, rounds: dict[int, Round]) -> None:
    client = field.federation.client
    for number in rounds:
        assert client.replay(run, number).identical
    assert client.verify(run).problems == ()


def test_a_site_that_is_always_slow_counts_in_every_next_round(field: Field) -> None:
    slow_down(field, "north", 8)
    run = field.federation.launch(config(field, "stale", rounds=5, stale=1))
    rounds = finished(field, run)
    assert [n for n, r in rounds.items() if "north" in r.missing] == [1, 3, 5]
    assert from_rounds(rounds, "north") == {2: 1, 4: 3}
    assert from_rounds(rounds, "south") == {}
    for number in (2, 4):
        assert (rounds[number].attempt, rounds[number].missing) == (1, {})
        parts = {"north": 1 / math.sqrt(2), "south": 1.0, "east": 1.0}
        weights = {row.site: row.weight for row in rounds[number].sites}
        expected = {site: part / sum(parts.values()) for site, part in parts.items()}
        assert weights == pytest.approx(expected)
        assert f"north from round {number - 1}" in notes(rounds[number])
    # Nor is it asked to assess what it has no time for.
    scored = {
        n: bool(row.scores) for n, r in rounds.items() for row in r.sites if row.site == "north"
    }
    assert scored == {1: False, 2: True, 3: False, 4: True, 5: True}
    # Once for each round in which it was slow; what came in place of its work was not begun. The last
    # round has no next one, so that it was told to stop.
    assert 2 * STEPS <= field.steps("north") < 3 * STEPS
    holds(field, run, rounds)


def test_it_counts_once_though_both_ends_are_killed(field: Field) -> None:
    """With what sites and orchestrator remember: residuals, momentum, epochs; in calls of Bulk."""
    federation = field.federation
    slow_down(field, "north", 12)
    stack = [{"name": "co_learning"}, {"name": "int8"}, {"name": "fedavgm"}]
    federation.kill("north", at="contribute.head.sent", process="link")
    run = federation.launch(
        config(field, "killed", rounds=6, stale=2, deadline_s=9, strategy=stack, hidden=20_000)
    )
    federation.await_fault("north", 120)
    federation.kill(ORCHESTRATOR, at="record.accepted", hit=2)  # counted, and nobody was told
    federation.revive()
    federation.await_fault(ORCHESTRATOR, 120)
    federation.revive()
    rounds = finished(field, run)
    counted = from_rounds(rounds, "north")
    assert counted
    assert min(counted.values()) == 1
    assert len(set(counted.values())) == len(counted)
    holds(field, run, rounds)
    states = [
        e for e in federation.client.watch(run, follow=False) if "state from before" in e.text
    ]
    assert states == []


def test_partial_work_comes_first(field: Field) -> None:
    slow_down(field, "north", 8)
    run = field.federation.launch(config(field, "both", rounds=2, stale=1, partial=True))
    rounds = finished(field, run)
    assert [r.missing for r in rounds.values()] == [{}, {}]
    assert from_rounds(rounds, "north") == {}
    assert all(row.partial for r in rounds.values() for row in r.sites if row.site == "north")
