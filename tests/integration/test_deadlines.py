"""The deadline of a real federation: what a slow site has done counts, and preparing is not slowness."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from orchestrator.cli.tables import notes
from orchestrator.views import Round
from tests.support.field import SITES, Field
from tests.support.files import wait_for

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(240), pytest.mark.slow]


@pytest.fixture
def field(real: Field) -> Iterator[Field]:
    warm = real.federation.launch(config(real, "warm", deadline_s=120))
    assert real.federation.wait(warm, 180).state == "finished"
    real.clear()
    yield real
    real.clear()
    real.federation.await_sites(SITES)


def committed(field: Field, run: str) -> list[Round]:
    view = field.federation.wait(run, 180)
    assert view.state == "finished", view.reason
    return field.federation.rounds(run)


def config(field: Field, name: str, **cohort: Any) -> dict[str, Any]:
    work = {"work": {"steps": 40}, "batch_size": 20, "lr": 0.1}
    cohort = {"quorum": "all", **cohort}
    return field.config(name, rounds=1, cohort=cohort, local=work, assess={"every": 0})


def test_what_a_slow_site_has_done_by_the_deadline_counts_and_replays(field: Field) -> None:
    (field.switches["north"] / "slow").write_text("0.2")  # 8 s of work
    run = field.federation.launch(config(field, "partial", deadline_s=5, partial=True))
    (round,) = committed(field, run)
    assert (round.attempt, round.missing) == (1, {})
    rows = {row.site: row for row in round.sites}
    north, others = rows.pop("north"), list(rows.values())
    assert north.partial
    assert north.done == field.steps("north")
    assert (north.planned, north.unit) == (40, "steps")
    assert 0 < north.done < 40
    assert not any(row.partial for row in others)
    examples = [round_row.examples for round_row in (north, *others)]
    assert examples == [round_of(north.done), 120, 120]
    weights = [row.weight for row in (north, *others)]
    assert weights == pytest.approx([e / sum(map(int, examples)) for e in examples])  # type: ignore[operator, arg-type]
    assert f"north partial: {north.done:.3g}/40 steps" in notes(round)

    client = field.federation.client
    assert client.replay(run, 1).identical
    assert client.verify(run).problems == ()


def round_of(steps: float) -> int:
    return max(1, round(120 * steps / 40))


def test_who_will_miss_the_deadline_is_said_before_the_round(field: Field) -> None:
    (field.switches["north"] / "slow").write_text("0.2")
    slow = config(field, "slow", deadline_s=5, partial=True) | {"rounds": 2}
    run = field.federation.launch(slow)
    told = field.federation.until(lambda e: "is not expected to make the deadline" in e.text, run)
    assert told.text.startswith(
        "site north is not expected to make the deadline of round 2: 40 steps take it about "
    )
    assert (told.level, told.site, told.round) == ("warning", "north", 2)
    needs = float(told.text.split("about ")[1].split(" s")[0])
    assert 7 < needs < 16
    rounds = committed(field, run)
    assert [row.partial for r in rounds for row in r.sites if row.site == "north"] == [True, True]
    north = field.federation.agents()["north"]
    assert north.alive


def test_time_that_a_site_prepares_does_not_run_against_it(field: Field) -> None:
    """Longer than the deadline, in the first round of a task; and a restart does not forget it."""
    (field.switches["north"] / "loading").write_text("6")
    loads = config(field, "loads", deadline_s=5, quorum="all")
    loads["task"] = {"name": "blobs", "params": {"samples": 100}}  # another one: loaded anew
    run = field.federation.launch(loads)

    def prepares(event: Any) -> bool:
        rows = event.data.get("sites", ()) if event.kind == "round" else ()
        return any(row["site"] == "north" and row["state"] == "preparing" for row in rows)

    field.federation.until(prepares, run)
    field.federation.kill_daemon()
    field.federation.start_daemon()
    (round,) = committed(field, run)
    assert (round.attempt, round.missing) == (1, {})
    assert round.closed is not None
    assert round.closed - round.started > 6


def test_a_daemon_that_is_killed_just_before_the_deadline_waits_for_its_sites(
    tmp_path: Path,
) -> None:
    grace_s = 30
    field = Field(tmp_path / "f", daemon={"sites": {"heartbeat_s": grace_s / 5}})
    with field.federation as federation:
        committed(field, federation.launch(config(field, "warm", deadline_s=120)))
        field.clear()
        gate = field.switches["north"] / "gate"
        gate.touch()
        run = federation.launch(config(field, "just-before", deadline_s=8))
        wait_for(field.switches["north"] / "reached", 60)
        (round,) = federation.rounds(run)
        assert round.deadline is not None
        Event().wait(round.deadline - 1 - time.time())
        federation.kill_daemon()
        federation.start_daemon()
        started = time.time()
        federation.await_sites(SITES)
        # By now it would be over: the deadline was a second away when the daemon was killed.
        Event().wait(started + 3 - time.time())
        gate.unlink()
        (round,) = committed(field, run)
        assert (round.attempt, round.missing) == (1, {})
        assert field.steps("north") == 40
