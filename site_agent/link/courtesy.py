"""Leaves room on a narrow line: bulk goes at a pace at which control is still heard in time.

Models and contributions would fill the queue of the narrowest router on the way, and every word of
control would wait behind it, or be dropped where it is full. As in LEDBAT (RFC 6817), the pace follows
the delay that we cause ourselves; what is measured is the round trip of the heartbeats, so that both
directions are served by one signal.
"""

from __future__ import annotations

from collections import deque

TARGET_S = 0.15
"""The delay on top of the least one that is aimed at."""

NARROW_BYTES_PER_S = 2.5e6
"""20 Mbit/s: on a wider line a round trip says more about busy processors than about queues."""

WIDE_BYTES_PER_S = 4 * NARROW_BYTES_PER_S
LEAST_BYTES_PER_S = 12_500.0
SURE_S = 4.0
"""A transfer that was slow for so long, while heartbeats were late, is on a narrow line."""

BASE_S = 600.0
"""The least delay is that of so many seconds: a route may become a longer one."""

REST_EVERY_S, REST_S = 240.0, 4.0
"""A long transfer goes at half its pace now and then, or its own delay would become the least one."""

BACK_OFF, GROW = 0.15, 0.05
"""Most change of the pace in a second, downwards and upwards."""


class Courtesy:
    """The pace of one direction; 0 until the line turns out to be narrow.

    Nothing in here looks at a clock: `look` is told.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self._least: deque[tuple[float, float]] = deque()  # when, and what: ever larger ones
        self._rest_at = float("inf")
        self._seen: deque[tuple[float, int, bool]] = deque()

    def look(self, now: float, round_trip_s: float | None, moved: int, busy: bool) -> float:
        """Look at the line; best once a second.

        Args:
            now: Seconds; only differences count.
            round_trip_s: Of the newest heartbeat, or how long one is overdue; None if unknown.
            moved: Bytes that moved so far.
            busy: Whether a transfer is under way.

        Returns:
            The pace, bytes a second; 0 for none.
        """
        if round_trip_s is None:
            return self.bytes_per_s
        delay = round_trip_s - self._base(now, round_trip_s)
        if not busy:
            self._seen.clear()
            return self.bytes_per_s
        self._seen.append((now, moved, delay > TARGET_S))
        before, had, _ = self._seen[0]
        speed = max(0.0, (moved - had) / (now - before)) if now > before else 0.0
        while now - self._seen[0][0] > SURE_S:
            self._seen.popleft()
        if self.bytes_per_s and now < self._rest_at:
            self._steer(delay, speed)
        elif self.bytes_per_s:
            self._seen.clear()
        elif now - before >= SURE_S and 0 < speed < NARROW_BYTES_PER_S:
            late = sum(is_late for _, _, is_late in self._seen)
            if 2 * late > len(self._seen):
                self.bytes_per_s = max(LEAST_BYTES_PER_S, speed * (1 - BACK_OFF))
                self._seen.clear()  # from now on it is counted on the wire
                self._rest_at = now + REST_EVERY_S
        if now < self._rest_at:
            return self.bytes_per_s
        if now > self._rest_at + REST_S:
            self._rest_at = now + REST_EVERY_S
        return self.bytes_per_s / 2

    def _base(self, now: float, round_trip_s: float) -> float:
        """The least round trip of the last time, this one included."""
        while self._least and self._least[-1][1] >= round_trip_s:
            self._least.pop()
        self._least.append((now, round_trip_s))
        while now - self._least[0][0] > BASE_S:
            self._least.popleft()
        return self._least[0][1]

    def _steer(self, delay: float, speed: float) -> None:
        off = max(-1.0, min(1.0, (TARGET_S - delay) / TARGET_S))
        if off < 0:
            # A pace that nobody comes up to would not slow anything down.
            self.bytes_per_s = min(self.bytes_per_s, 1.2 * speed or self.bytes_per_s)
            self.bytes_per_s *= 1 + BACK_OFF * off
        elif speed > self.bytes_per_s / 2:
            self.bytes_per_s *= 1 + GROW * off
        self.bytes_per_s = max(LEAST_BYTES_PER_S, self.bytes_per_s)
        if self.bytes_per_s > WIDE_BYTES_PER_S:
            self.bytes_per_s = 0.0
