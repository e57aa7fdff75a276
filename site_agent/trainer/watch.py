"""What a job tells the link while it runs, and what the link wants of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic

from site_agent.pipe import Progress

INTERVAL_S = 0.25
"""Progress is told at most this often."""

BRIEF_S = 0.05
"""In the beginning of a job nothing is told: one that is over by then costs no line."""


class JobCancelled(Exception):
    """The link does not want this job any more."""


class Watch:
    """One job's line to the link.

    Args:
        job: Its number.
        tell: Sends a line.
        cancelled: Set when the link cancels the job.
        finishing: Set when the link wants what is done, and no more.
        began: When the job began, on the monotonic clock; now by default.
    """

    def __init__(
        self,
        job: int,
        tell: Callable[[Progress], None],
        cancelled: threading.Event | None = None,
        finishing: threading.Event | None = None,
        began: float | None = None,
    ) -> None:
        self.job, self._tell = job, tell
        self._cancelled = cancelled or threading.Event()
        self._finishing = finishing or threading.Event()
        self._began = monotonic() if began is None else began
        self._last = float("-inf")

    def check(self) -> None:
        """Between two steps.

        Raises:
            JobCancelled: The job is to stop.
        """
        if self._cancelled.is_set():
            raise JobCancelled

    @property
    def enough(self) -> bool:
        """Whether to end here, between two steps, with what is done."""
        return self._finishing.is_set()

    @property
    def due(self) -> bool:
        """Whether it is time to tell how far the job is."""
        return monotonic() - self._last >= INTERVAL_S

    def tell(self, progress: Progress) -> None:
        """Tell it, unless the job has just begun."""
        now = monotonic()
        if now - self._began >= BRIEF_S:
            self._last = now
            self._tell(progress)
