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

BACK_OFF, GROW = 0.15, 0.05
"""Most change of the pace in a second, downwards and upwards."""


class Courtesy:
    """The pace of one direction; 0 until the line turns out to be narrow.

    Nothing in here looks at a clock: `look` is told.
    """

    def __init__(self) -> None:
        self.bytes_per_s = 0.0
        self._least = float("inf")
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
        self._least = min(self._least, round_trip_s)
        delay = round_trip_s - self._least
        if not busy:
            self._seen.clear()
            return self.bytes_per_s
        self._seen.append((now, moved, delay > TARGET_S))
        before, had, _ = self._seen[0]
        speed = max(0.0, (moved - had) / (now - before)) if now > before else 0.0
        while now - self._seen[0][0] > SURE_S:
            self._seen.popleft()
        if self.bytes_per_s:
            self._steer(delay, speed)
        elif now - before >= SURE_S and 0 < speed < NARROW_BYTES_PER_S:
            late = sum(is_late for _, _, is_late in self._seen)
            if 2 * late > len(self._seen):
                self.bytes_per_s = max(LEAST_BYTES_PER_S, speed * (1 - BACK_OFF))
                self._seen.clear()  # from now on it is counted on the wire
        return self.bytes_per_s

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
