"""A pace that leaves room for control, on a simulated line."""

from collections.abc import Callable, Iterator

import pytest

from site_agent.link.courtesy import Courtesy

STEP = 0.05


def simulate(
    line: float,
    queue_s: float,
    seconds: float,
    base_s: Callable[[float], float] = lambda second: 0.04,
) -> Iterator[tuple[float, float, float, float]]:
    """A transfer that always has more to send; gives second, delay, pace and bytes that came."""
    courtesy, queue, came, delay, pace = Courtesy(), 0.0, 0.0, 0.0, 0.0
    sent = 0.0
    courtesy.look(-1.0, base_s(0), 0, False)
    for tick in range(int(seconds / STEP)):
        room = line * queue_s - queue + line * STEP
        offered = min(room, (pace or 1e12) * STEP)
        sent += offered
        gone = min(queue + offered, line * STEP)
        queue += offered - gone
        came += gone
        if tick % 20 == 0:
            pace = courtesy.look(tick * STEP, base_s(tick * STEP) + delay, int(came), True)
            yield tick * STEP, queue / line, pace, came
            delay = queue / line  # what is heard is older than what is


@pytest.mark.parametrize("line", [25_000.0, 250_000.0, 1.2e6])
@pytest.mark.parametrize("queue_s", [0.4, 2.0])
def test_a_narrow_line_keeps_a_short_queue_and_is_used(line: float, queue_s: float) -> None:
    seen = list(simulate(line, queue_s, 120))
    assert all(delay < 0.5 for second, delay, _, _ in seen if second > 20)
    assert used(seen, 20, line) > 0.85


def used(seen: list[tuple[float, float, float, float]], since: float, line: float) -> float:
    """How much of a line was used from some second on."""
    begin = next(s for s in seen if s[0] >= since)
    return (seen[-1][3] - begin[3]) / (seen[-1][0] - begin[0]) / line


def test_its_own_delay_never_becomes_the_usual_one() -> None:
    seen = list(simulate(250_000.0, 2.0, 3 * 3600))
    assert all(delay < 0.5 for second, delay, _, _ in seen if second > 20)
    assert used(seen, 20, 250_000.0) > 0.85


def test_a_longer_route_does_not_starve_it() -> None:
    seen = list(simulate(250_000.0, 0.4, 3600, lambda second: 0.04 if second < 300 else 0.6))
    assert used(seen, 1000, 250_000.0) > 0.75


@pytest.mark.parametrize("line", [1.2e7, 1e9])
def test_a_wide_line_is_left_alone_whatever_the_delay(line: float) -> None:
    assert not any(pace for _, _, pace, _ in simulate(line, 0.5, 30))


def test_without_delay_a_slow_transfer_is_left_alone() -> None:
    courtesy = Courtesy()
    moved = [courtesy.look(t, 0.03 + 0.01 * (t % 3), 10_000 * t, True) for t in range(60)]
    assert not any(moved)


def test_short_transfers_and_late_heartbeats_are_no_narrow_line() -> None:
    courtesy = Courtesy()
    courtesy.look(0, 0.01, 0, False)
    found = [courtesy.look(t, 0.5, 40_000 * t, busy=t % 3 != 0) for t in range(1, 60)]
    assert not any(found)


def test_a_line_that_became_wide_is_let_go() -> None:
    courtesy, moved = Courtesy(), 0.0
    courtesy.look(0, 0.03, 0, False)
    for t in range(1, 8):
        moved += 250_000
        courtesy.look(t, 0.5, int(moved), True)
    assert courtesy.bytes_per_s
    for t in range(8, 200):
        moved += courtesy.bytes_per_s or 5e7
        courtesy.look(t, 0.03, int(moved), True)
    assert not courtesy.bytes_per_s
