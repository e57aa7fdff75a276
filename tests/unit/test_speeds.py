"""How fast sites are, and who will not make it: from what was seen of the last round."""

from __future__ import annotations

import pytest

from orchestrator import board as board_module
from orchestrator.board import Board
from orchestrator.speeds import Speed, lead_s, measured, speeds_of, too_slow
from orchestrator.views import SitePhase

NORTH = Speed("epochs", 10.0, 4.0, 3.0)


def phases(*parts: tuple[str, float, float | None]) -> list[SitePhase]:
    return [SitePhase(state=s, start=a, end=b) for s, a, b in parts]  # type: ignore[arg-type]


def test_a_speed_is_what_was_done_in_the_time_for_it() -> None:
    seen = phases(
        ("asked", 0, 1), ("preparing", 1, 50), ("fetching", 50, 51), ("training", 51, 71),
        ("encoding", 71, 72), ("sending", 72, 74), ("counted", 74, None),
    )  # fmt: skip
    assert measured(seen, "epochs", 2.0, 99.0) == NORTH


def test_who_is_late_is_measured_by_what_it_had_done() -> None:
    seen = phases(("fetching", 0, 2), ("training", 2, None))
    assert measured(seen, "steps", 5.0, 12.0) == Speed("steps", 2.0, 2.0, 0.0)


@pytest.mark.parametrize("done", [0.0, -1.0])
def test_who_was_not_seen_training_has_none(done: float) -> None:
    assert measured(phases(("training", 0, 5)), "steps", done, 9.0) is None
    assert measured(phases(("counted", 0, None)), "steps", 5.0, 9.0) is None


def test_who_will_miss_a_deadline() -> None:
    speeds = {"north": NORTH, "south": Speed("steps", 1.0, 0.0, 0.0)}
    work = {"epochs": 5.0, "steps": None, "tokens": None, "seconds": None}
    sites = ("east", "north", "south")  # east is new, south was measured in another unit
    assert too_slow(speeds, sites, work, 53.9) == {"north": 54.0}
    assert too_slow(speeds, sites, work, 54.0) == {}
    assert too_slow(speeds, sites, {"seconds": 20.0}, 23.0) == {"north": 24.0}


def test_there_is_time_to_encode_and_send() -> None:
    assert lead_s(NORTH, 100.0) == 1 + 5 + 6
    assert lead_s(None, 100.0) == 1 + 5 + 10
    assert lead_s(Speed("epochs", 1.0, 90.0, 90.0), 100.0) == 50.0


def test_speeds_outlive_the_rounds_that_a_site_misses() -> None:
    summary = {"speeds": {"north": NORTH.facts()}}
    assert speeds_of(summary) == {"north": NORTH}
    assert speeds_of({}) == {}


def test_the_board_measures_what_it_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def time(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(board_module, "time", clock)
    board = Board()
    board.begin("r", 1, 1, ["cut", "late", "quick", "whole"])
    for site, done in (("whole", 0.0), ("cut", 0.0), ("late", 6.0)):  # of late's, a restart forgot
        board.progress(site, "training", done, 10.0, "steps", None, None, None)
    board.note("cut", finishing=True)
    clock.now = 8.0
    board.progress("cut", "training", 4.0, 10.0, "steps", None, None, None)
    board.progress("late", "training", 8.0, 10.0, "steps", None, None, None)
    for site in ("cut", "quick", "whole"):
        board.set_state(site, "counted")
    clock.now = 20.0
    speeds = board.speeds()
    assert {site: speed.per_unit_s for site, speed in speeds.items()} == {
        "cut": 2.0, "late": 10.0, "whole": 0.8,
    }  # fmt: skip
    board.note("cut", partial=(5.0, 10.0, "steps"))
    row = next(r for r in board.rows() if r.site == "cut")
    assert (row.partial, row.done, row.planned) == (True, 5.0, 10.0)
