"""What a start does about the rounds that the daemon before left open."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.ledger import Ledger, PlanRow, RoundRow, RunRow
from orchestrator.restart import take_up_rounds
from protos.digest import digest

STARTED, DEADLINE_S, GRACE_S = 1000.0, 600.0, 10.0


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(tmp_path / "ledger.sqlite")
    ledger.create_run(RunRow("r1", "fashion", {"name": "fashion"}, digest(b"config"), 3, 999.0))
    row = RoundRow("r1", 1, 1, quorum=1, started=STARTED, deadline_s=DEADLINE_S)
    ledger.plan_round(row, [PlanRow("r1", 1, 1, "train", "north", b"plan", digest(b"work"))])
    yield ledger
    ledger.close()


def deadline_after(ledger: Ledger, now: float, last_seen: float | None) -> float:
    take_up_rounds(ledger, last_seen, GRACE_S, lambda: now)
    row = ledger.round("r1", 1, 1)
    return row.started + row.deadline_s


@pytest.mark.parametrize(
    ("now", "last_seen", "deadline"),
    [
        (1300.0, 1200.0, 1700.0),  # later by what it was away
        (1300.0, None, 1600.0),
        (1300.0, 1400.0, 1600.0),  # a clock that was set back
        (1596.0, 1595.0, 1606.0),  # four seconds are no time to come back in
        (1596.0, None, 1606.0),
        (1700.0, 1599.0, 1710.0),  # it was down at the deadline, one second of which was left
        (1700.0, 1560.0, 1740.0),
    ],
)
def test_sites_have_the_time_that_the_daemon_was_away_and_at_least_the_grace(
    ledger: Ledger, now: float, last_seen: float | None, deadline: float
) -> None:
    assert deadline_after(ledger, now, last_seen) == deadline


def test_a_daemon_that_is_started_again_and_again_adds_no_more_than_that(ledger: Ledger) -> None:
    assert deadline_after(ledger, 1596.0, 1595.0) == 1606.0
    assert deadline_after(ledger, 1596.5, 1596.0) == 1606.5
    assert deadline_after(ledger, 1599.0, 1598.5) == 1609.0


def test_a_round_that_is_closed_stays_as_it_is(ledger: Ledger) -> None:
    ledger.close_round("r1", 1, 1, None, "all answered")
    assert deadline_after(ledger, 1700.0, 1560.0) == STARTED + DEADLINE_S
