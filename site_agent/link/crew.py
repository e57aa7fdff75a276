"""The threads of an agent: one that fails ends the agent, loudly, so that it is started again."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable

from site_agent.link.journal import Journal


class Crew:
    """See the module.

    Args:
        journal: Log.
        end: Called when one of them failed.

    Attributes:
        failed: Name of the one that failed; empty if none did.
    """

    def __init__(self, journal: Journal, end: Callable[[], None]) -> None:
        self._journal, self._end = journal, end
        self._threads: list[threading.Thread] = []
        self.failed = ""

    def start(self, name: str, target: Callable[[], None]) -> None:
        """One more."""
        thread = threading.Thread(target=self._run, args=(name, target), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _run(self, name: str, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception:  # noqa: BLE001  # whatever it is, nobody else would see it
            self._journal.error(f"{name} failed", traceback=traceback.format_exc())
            self.failed = name
            self._end()

    def join(self, timeout_s: float) -> None:
        """Wait for their ends, so long for each."""
        for thread in self._threads:
            thread.join(timeout_s)
