"""What is shown of the round under way: states in order, final ones for good, numbers added up."""

import pytest

from orchestrator import board as board_module
from orchestrator.board import PUBLISH_EVERY_S, Board
from orchestrator.cli.tables import window
from orchestrator.views import SiteWork, WorkState


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(board_module, "time", clock)
    return clock


@pytest.fixture
def published() -> list[int]:
    return []


@pytest.fixture
def board(clock: Clock, published: list[int]) -> Board:
    board = Board(lambda: published.append(1))
    board.begin("r", 1, 1, ["south", "north"])
    return board


def row(board: Board, site: str = "north") -> SiteWork:
    return next(r for r in board.rows() if r.site == site)


def train(
    board: Board, done: float, planned: float | None = 10.0, loss: float | None = 0.5
) -> None:
    board.progress("north", "training", done, planned, "epochs", loss, 0.1, 99.0)


def test_everybody_is_asked_at_first(board: Board, published: list[int]) -> None:
    assert board.key == ("r", 1, 1)
    assert [(r.site, r.state) for r in board.rows()] == [("north", "asked"), ("south", "asked")]
    assert len(published) == 1


def test_phases_are_a_timeline_without_gaps(board: Board, clock: Clock) -> None:
    for state in ("waiting", "fetching", "training", "encoding", "sending", "counted"):
        clock.now += 1
        board.set_state("north", state)  # type: ignore[arg-type]
    clock.now += 50
    phases = row(board).phases
    assert [(p.state, p.start, p.end) for p in phases] == [
        ("asked", 1000, 1001),
        ("waiting", 1001, 1002),
        ("fetching", 1002, 1003),
        ("training", 1003, 1004),
        ("encoding", 1004, 1005),
        ("sending", 1005, 1006),
        ("counted", 1006, None),
    ]


def test_the_same_state_again_is_no_new_phase(board: Board, clock: Clock) -> None:
    for done in (1.0, 2.0, 3.0):
        clock.now += 1
        train(board, done)
    assert [p.state for p in row(board).phases] == ["asked", "training"]
    assert row(board).done == 3.0


@pytest.mark.parametrize("final", ["counted", "late", "refused", "failed", "left"])
@pytest.mark.parametrize("later", ["gone", "asked", "training"])
def test_a_final_state_stays(board: Board, final: WorkState, later: WorkState) -> None:
    board.set_state("north", final, "E", "why")
    board.set_state("north", later)
    train(board, 1.0)
    assert (row(board).state, row(board).error, row(board).reason) == (final, "E", "why")


def test_work_that_came_after_all_replaces_a_failure(board: Board) -> None:
    board.set_state("north", "failed", "TaskFailed", "killed")
    board.set_state("north", "counted")
    assert (row(board).state, row(board).reason) == ("counted", "")


def test_a_site_that_was_gone_goes_on(board: Board) -> None:
    board.set_state("north", "gone")
    train(board, 1.0)
    assert row(board).state == "training"


def test_strangers_are_not_shown(board: Board) -> None:
    board.set_state("west", "counted")
    board.progress("west", "training", 1, 2, "epochs", None, None, None)
    board.note("west", received=5)
    assert [r.site for r in board.rows()] == ["north", "south"]
    assert board.wire_bytes() == 0


def test_a_new_attempt_forgets_the_one_before(board: Board) -> None:
    board.set_state("north", "refused", "E", "why")
    board.took("reducing", 3.0)
    board.begin("r", 1, 2, ["north"])
    assert [(r.site, r.state, r.reason) for r in board.rows()] == [("north", "asked", "")]
    assert board.seconds == {}


def test_the_same_attempt_again_keeps_what_is_known(board: Board) -> None:
    """After a restart plans are offered again."""
    board.set_state("north", "counted")
    board.begin("r", 1, 1, ["north", "south", "east"])
    assert [(r.site, r.state) for r in board.rows()] == [
        ("east", "asked"),
        ("north", "counted"),
        ("south", "asked"),
    ]


def test_time_left_follows_from_the_pace(board: Board, clock: Clock) -> None:
    train(board, 0.0)
    assert row(board).eta_s is None
    clock.now += 4
    train(board, 2.0)
    assert row(board).eta_s == pytest.approx(16.0)
    train(board, 2.0, planned=None)
    assert row(board).eta_s is None
    board.set_state("north", "encoding")
    assert row(board).eta_s is None


def test_progress_of_other_phases_does_not_overwrite_training(board: Board) -> None:
    train(board, 7.0)
    board.progress("north", "sending", 123.0, 456.0, "bytes", None, None, None)
    assert (row(board).done, row(board).unit, row(board).loss) == (7.0, "epochs", 0.5)


def test_progress_is_published_now_and_then_and_states_at_once(
    board: Board, clock: Clock, published: list[int]
) -> None:
    published.clear()
    train(board, 1.0)
    assert len(published) == 1
    for _ in range(50):
        clock.now += PUBLISH_EVERY_S / 100
        train(board, 2.0)
    assert len(published) == 1
    clock.now += PUBLISH_EVERY_S
    train(board, 3.0)
    assert len(published) == 2
    board.set_state("south", "gone")
    assert len(published) == 3


def test_a_site_that_waits_for_a_window_is_shown_so_at_once(
    board: Board, published: list[int]
) -> None:
    def say(waits_until: float | None) -> None:
        board.progress("north", "sending", 1.0, 2.0, "bytes", None, None, None, waits_until)

    say(None)
    before = len(published)
    say(5000.0)
    assert len(published) == before + 1
    assert (row(board).state, row(board).waits_until) == ("sending", 5000.0)
    assert window(row(board)).startswith("no window is open until ")
    say(None)
    assert row(board).waits_until is None
    say(5000.0)
    board.set_state("north", "counted")
    assert row(board).waits_until is None
    assert window(row(board)) == ""


def test_facts_are_added_and_replaced(board: Board) -> None:
    board.note("north", received=100, sent=1)
    board.note("north", received=20, norm=2.0, weight=0.25, examples=7, loss=0.5)
    board.note("south", sent=3, scores={"val.accuracy": 0.5})
    board.note("south", scores={"val.nll": 1.0})
    north, south = row(board), row(board, "south")
    assert (north.received_bytes, north.sent_bytes) == (120, 1)
    assert (north.norm, north.weight, north.examples, north.loss) == (2.0, 0.25, 7, 0.5)
    assert south.scores == {"val.accuracy": 0.5, "val.nll": 1.0}
    assert board.wire_bytes() == 124
    board.note("north")
    assert row(board).norm == 2.0


def test_seconds_are_means_over_the_sites_and_our_own(board: Board, clock: Clock) -> None:
    clock.now += 2  # both asked for two seconds
    board.set_state("north", "training")
    clock.now += 4
    board.set_state("north", "counted")
    clock.now += 2
    board.took("reducing", 1.5)
    board.took("reducing", 0.5)
    assert board.mean_seconds(board.rows()) == {
        "waiting": pytest.approx((2 + 8) / 2),
        "training": pytest.approx(4 / 2),
        "reducing": 2.0,
    }


def test_no_sites_no_seconds(clock: Clock) -> None:
    assert Board().mean_seconds(()) == {}
    assert Board().rows() == ()
