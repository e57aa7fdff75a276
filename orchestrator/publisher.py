"""Says soon that something changed, and not each time that it did."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

EVERY_S = 0.25
"""A view is built and published at most this often: for 64 sites one is 80 KB, and a round in which
they train for a moment has 450 changes."""

REST = 10.0
"""What a call took is waited this many times before the next: views are not to crowd out the work."""


class Publisher:
    """Calls a function soon after something changed: at once if it was not called lately.

    The last change is always followed by a call.

    Args:
        publish: What is called; never twice at a time.
        every_s: Least time between two calls that `soon` asks for; more after a long one.
    """

    def __init__(self, publish: Callable[[], None], every_s: float = EVERY_S) -> None:
        self._publish, self._every_s = publish, every_s
        self._news = threading.Condition()
        self._calling = threading.Lock()
        self._due = self._closed = False
        self._next = float("-inf")
        self._thread = threading.Thread(target=self._live, name="publisher", daemon=True)
        self._thread.start()

    def soon(self) -> None:
        """Something changed; returns at once."""
        with self._news:
            if not self._due:
                self._due = True
                self._news.notify_all()

    def now(self) -> None:
        """Something changed that must be seen as it is at this moment."""
        with self._news:
            self._due = False
        self._call()

    def close(self) -> None:
        """No call begins after this; waits for one that is under way."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._thread.join()

    def _live(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._due or self._closed)
                self._news.wait_for(lambda: self._closed, self._next - time.monotonic())
                if self._closed:
                    return
                if not self._due:  # `now` came first
                    continue
                self._due = False
            try:
                self._call()
            except Exception:
                log.exception("a view can't be published")

    def _call(self) -> None:
        with self._calling:
            began = time.monotonic()
            try:
                self._publish()
            finally:
                took = time.monotonic() - began
                self._next = began + max(self._every_s, REST * took)
