"""What went on, for those who watch: a second file, written in batches, of bounded length."""

from __future__ import annotations

from pathlib import Path

from orchestrator.views import Event

KEPT_EVENTS = 200_000


class EventLog:
    """The progress log. Safe for use from many threads.

    Numbers ascend and are never given twice, also across a crash (they may then have a gap).

    Args:
        path: The file; it is made if there is none, and replaced if it can't be read.
        keep: How many events stay; older ones are removed.
    """

    def __init__(self, path: Path, keep: int = KEPT_EVENTS) -> None:
        raise NotImplementedError

    def append(self, event: Event) -> int:
        """Take an event, give its number at once (``event.number`` is ignored); no disk is touched."""
        raise NotImplementedError

    def after(self, number: int, run: str | None = None, limit: int = 1000) -> list[Event]:
        """Events with a larger number, oldest first; only those of one run if one is given."""
        raise NotImplementedError

    def last_number(self) -> int:
        """The newest event's number; 0 if there never was one."""
        raise NotImplementedError

    def wait(self, number: int, timeout: float) -> bool:
        """Wait until there is an event with a larger number; whether there is one."""
        raise NotImplementedError

    def heartbeat(self, now: float) -> None:
        """The daemon lives; written with the next batch."""
        raise NotImplementedError

    def last_heartbeat(self) -> float | None:
        """The newest heartbeat, at the start the one of the daemon before; None for none."""
        raise NotImplementedError

    def flush(self) -> None:
        """Wait until everything is written."""
        raise NotImplementedError

    def close(self) -> None:
        """Write everything and close."""
        raise NotImplementedError
