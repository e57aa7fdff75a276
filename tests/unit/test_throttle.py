"""The pace of a line, on a clock that only the test moves."""

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from site_agent.link.throttle import BURST_S, LEAST_PIECE, MOST_PIECE, Throttle

RATE = 250_000.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def throttle(rate: float = RATE) -> tuple[Throttle, Clock]:
    clock = Clock()
    made = Throttle(clock)
    made.cap = rate
    return made, clock


def most_within(gone: list[tuple[float, int]], seconds: float) -> float:
    """The most bytes in any window of that length."""
    return max(sum(n for t, n in gone if start <= t < start + seconds) for start, _ in gone)


@given(
    steps=st.lists(
        st.tuples(st.integers(1, 60_000), st.floats(0, 0.5), st.floats(0, 0.05)), min_size=30
    ),
    rate=st.floats(12_500, 1e8),
)
def test_no_window_carries_more_than_rate_and_burst(
    steps: list[tuple[int, float, float]], rate: float
) -> None:
    pace, clock = throttle(rate)
    gone = []
    for nbytes, idle, late in steps:
        clock.now += idle  # nothing to send for a while
        clock.now += pace.reserve(nbytes) + late  # a sleep is never too short, often too long
        gone.append((clock.now, nbytes))
    for seconds in (0.1, 1.0, 10.0):
        largest = max(n for n, _, _ in steps)  # its bytes all count at the instant of its end
        assert most_within(gone, seconds) <= rate * (seconds + BURST_S) * (1 + 1e-9) + largest


def test_a_line_that_always_has_more_to_carry_is_used_up() -> None:
    pace, clock = throttle()
    gone, piece = 0, pace.piece
    until = clock.now + 60
    while clock.now < until:
        clock.now += pace.reserve(piece) + 0.004  # a scheduler's usual lateness
        gone += piece
    assert 0.99 <= gone / (60 * RATE) <= 1.01


def test_two_transfers_share_it() -> None:
    pace, clock = throttle()
    waits = [pace.reserve(25_000) for _ in range(4)]
    assert waits[0] >= 0
    assert all(math.isclose(b - a, 25_000 / RATE) for a, b in pairwise(waits))
    assert math.isclose(waits[-1], 4 * 25_000 / RATE)
    assert clock.now == 1000.0


def test_another_cap_counts_at_once_and_none_lets_all_through() -> None:
    pace, clock = throttle()
    clock.now += pace.reserve(250_000)
    pace.cap = RATE / 10
    assert math.isclose(pace.reserve(25_000), 1.0)
    clock.now += 1.0
    pace.cap = 0.0
    assert pace.reserve(1 << 40) == 0.0
    pace.cap = RATE  # what went without a cap is not made up for
    assert math.isclose(pace.reserve(25_000), 0.1)


def test_pieces_are_small_beside_the_cap() -> None:
    assert throttle(0.1e6 / 8)[0].piece == LEAST_PIECE
    assert throttle(2e6 / 8)[0].piece == 5000
    assert throttle(1e10)[0].piece == throttle(0)[0].piece == MOST_PIECE
