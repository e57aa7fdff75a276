"""The pace of one direction: a token bucket that all bulk connections of a site share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

BURST_S = 0.1
"""What an idle line saves up: a tenth of a second, so that control never waits longer behind it."""

PIECE_S = 0.02
"""What is passed on at once: an even flow, and fifty wake-ups a second."""

LEAST_PIECE, MOST_PIECE = 1448, 256 << 10
"""Bytes: one packet; what is worth a system call."""


class Throttle:
    """In any time t at most ``rate * (t + BURST_S)`` bytes go.

    Args:
        clock: Seconds; only differences count.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._due = clock()  # when everything that was reserved has gone
        self.cap = self.courteous = 0.0
        """Bytes a second: what site.toml allows, what a narrow line asks for; 0 for none."""
        self.passed_bytes = 0

    @property
    def bytes_per_s(self) -> float:
        """The lower of the two; 0 for no pace at all."""
        return min((rate for rate in (self.cap, self.courteous) if rate), default=0.0)

    @property
    def piece(self) -> int:
        """How many bytes to pass on at once."""
        if not self.bytes_per_s:
            return MOST_PIECE
        return max(LEAST_PIECE, min(MOST_PIECE, int(self.bytes_per_s * PIECE_S)))

    def reserve(self, nbytes: int) -> float:
        """Claim the next bytes; in how many seconds they may go."""
        with self._lock:
            self.passed_bytes += nbytes
            rate, now = self.bytes_per_s, self._clock()
            if not rate:
                self._due = now
                return 0.0
            self._due = max(self._due, now - BURST_S) + nbytes / rate
            return max(0.0, self._due - now)

    def take(self, nbytes: int) -> None:
        """Wait until the next bytes may go."""
        wait = self.reserve(nbytes)
        if wait:
            time.sleep(wait)
