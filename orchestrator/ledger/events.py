"""What went on, for those who watch: a second file, written in batches, of bounded length.

Nothing here is durable in the ledger's sense: at a power cut the last moments are gone, and a file
that can't be read is put aside for a new one. No round depends on it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from itertools import takewhile
from pathlib import Path

from orchestrator.views import Event
from protos.faults import reach

log = logging.getLogger(__name__)

KEPT_EVENTS = 200_000
RECENT_EVENTS = 4096
"""How many are kept in memory too: whoever follows along never touches the disk."""

BATCH_S = 0.25
"""How long an event may wait to be written with others."""

NUMBER_BLOCK = 100_000
"""Numbers are reserved on disk in blocks, well ahead of their use, so that none is given twice even
if the events that had them were lost in a crash."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, run TEXT NOT NULL, event TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS ix_events_run ON events (run, number);
CREATE TABLE IF NOT EXISTS marks (name TEXT PRIMARY KEY, value REAL NOT NULL);
"""


class EventLog:
    """The progress log. Safe for use from many threads.

    Numbers ascend and are never given twice, also across a crash (they may then have a gap).

    Args:
        path: The file; it is made if there is none, and put aside if it can't be read.
        keep: How many events stay; older ones are removed.
    """

    def __init__(self, path: Path, keep: int = KEPT_EVENTS) -> None:
        self._path, self._keep = path, keep
        self._disk = threading.Lock()  # around the connection
        lock = threading.Lock()  # around everything below
        self._news, self._written = threading.Condition(lock), threading.Condition(lock)
        self._db, marks, recent = _open(path)
        self._recent: deque[Event] = deque(recent, RECENT_EVENTS)
        self._unwritten: list[Event] = []
        self._number = max(int(marks.get("reserved", 0)), recent[-1].number if recent else 0)
        self._reserved = self._number + NUMBER_BLOCK
        self._last = recent[-1].number if recent else 0
        self._heartbeat = marks.get("heartbeat")
        self._heartbeat_unwritten = False
        self._busy = self._closing = self._hurry = False
        self._since_trim = keep  # trim with the first batch
        self._save([], {"reserved": float(self._reserved)})
        self._thread = threading.Thread(target=self._write, name="event-log", daemon=True)
        self._thread.start()

    def append(self, event: Event) -> int:
        """Take an event, give its number (``event.number`` is ignored); waits for no disk.

        After `close` it is only kept in memory.
        """
        with self._news:
            self._number += 1
            event = event.model_copy(update={"number": self._number})
            self._last = self._number
            self._recent.append(event)
            if not self._closing:
                self._unwritten.append(event)
            self._news.notify_all()
            return self._number

    def after(self, number: int, run: str | None = None, limit: int = 1000) -> list[Event]:
        """Events with a larger number, oldest first; only those of one run if one is given."""
        with self._news:
            oldest = self._recent[0].number if self._recent else None
            # From the newest back: each event wakes all who follow, and few are behind by many.
            recent = list(takewhile(lambda e: e.number > number, reversed(self._recent)))
        found: list[Event] = []
        # All that memory does not have is on disk: what is not written yet is always recent.
        if oldest is None or oldest > number + 1:
            found = self._from_disk(number, oldest, run, limit)
        found += [e for e in reversed(recent) if run is None or e.run == run]
        return found[:limit]

    def last_number(self) -> int:
        """The newest event's number; 0 if there never was one."""
        with self._news:
            return self._last

    def wait(self, number: int, timeout: float) -> bool:
        """Wait until there is an event with a larger number; whether there is one."""
        with self._news:
            return self._news.wait_for(lambda: self._last > number, timeout)

    def heartbeat(self, now: float) -> None:
        """The daemon lives; written with the next batch."""
        with self._news:
            self._heartbeat, self._heartbeat_unwritten = now, True
            self._news.notify_all()

    def last_heartbeat(self) -> float | None:
        """The newest heartbeat, at the start the one of the daemon before; None for none."""
        with self._news:
            return self._heartbeat

    def flush(self) -> None:
        """Wait until everything that came before is written."""
        with self._news:
            self._hurry = True
            self._news.notify_all()
            self._written.wait_for(
                lambda: not (self._unwritten or self._heartbeat_unwritten or self._busy)
            )

    def close(self) -> None:
        """Write everything and close."""
        with self._news:
            self._closing = True
            self._news.notify_all()
        self._thread.join()
        with self._disk:
            self._db.close()

    # ----------------------------------------------------------------------------- the writer

    def _write(self) -> None:
        closing = False
        while not closing:
            with self._news:
                self._news.wait_for(
                    lambda: self._unwritten or self._heartbeat_unwritten or self._closing
                )
                # More may come: one batch costs about what one event does.
                self._news.wait_for(lambda: self._hurry or self._closing, BATCH_S)
                batch, self._unwritten = self._unwritten, []
                marks: dict[str, float] = {}
                if self._heartbeat is not None and self._heartbeat_unwritten:
                    marks["heartbeat"] = self._heartbeat
                self._heartbeat_unwritten = self._hurry = False
                self._busy, closing = True, self._closing
                if closing:
                    marks["reserved"] = float(self._number)
                elif self._number + NUMBER_BLOCK // 2 > self._reserved:
                    self._reserved = self._number + NUMBER_BLOCK
                    marks["reserved"] = float(self._reserved)
            try:
                self._save(batch, marks)
            except sqlite3.Error as error:
                # A full disk must not stop a round; what is lost is the history of progress.
                log.warning("progress log: %d events were not written: %s", len(batch), error)
            with self._news:
                self._busy = False
                self._written.notify_all()

    def _save(self, batch: list[Event], marks: dict[str, float]) -> None:
        with self._disk, self._db:
            self._db.executemany(
                "INSERT OR REPLACE INTO events VALUES (?, ?, ?)",
                [(event.number, event.run, event.model_dump_json()) for event in batch],
            )
            self._db.executemany("INSERT OR REPLACE INTO marks VALUES (?, ?)", list(marks.items()))
            reach("events.written")
            self._since_trim += len(batch)
            if self._since_trim > self._keep // 20:
                self._since_trim = 0
                self._db.execute(
                    "DELETE FROM events WHERE number <="
                    " (SELECT number FROM events ORDER BY number DESC LIMIT 1 OFFSET ?)",
                    (self._keep,),
                )

    def _from_disk(
        self, number: int, before: int | None, run: str | None, limit: int
    ) -> list[Event]:
        query = "SELECT event FROM events WHERE number > ? AND number < ?"
        values: list[int | str] = [number, before if before is not None else 1 << 62]
        if run is not None:
            query += " AND run = ?"
            values.append(run)
        with self._disk:
            rows = self._db.execute(f"{query} ORDER BY number LIMIT ?", [*values, limit]).fetchall()
        return [Event.model_validate_json(row[0]) for row in rows]


def _open(path: Path) -> tuple[sqlite3.Connection, dict[str, float], list[Event]]:
    try:
        return _try(path)
    except (sqlite3.DatabaseError, ValueError) as error:  # ValueError: an event of another version
        if isinstance(error, sqlite3.OperationalError):
            raise  # locked, or no such folder: a new file would not help
        aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
        log.warning("progress log: %s can't be read (%s); it is now %s", path, error, aside)
        path.rename(aside)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        # Numbers go on above any that were given: nobody has had as many events as seconds passed.
        db, _, _ = _try(path)
        return db, {"reserved": float(int(time.time()))}, []


def _try(path: Path) -> tuple[sqlite3.Connection, dict[str, float], list[Event]]:
    db = sqlite3.connect(path, timeout=5.0, check_same_thread=False)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.executescript(SCHEMA)
        marks = dict(db.execute("SELECT name, value FROM marks").fetchall())
        query = "SELECT event FROM events ORDER BY number DESC LIMIT ?"
        rows = db.execute(query, (RECENT_EVENTS,)).fetchall()
        recent = [Event.model_validate_json(row[0]) for row in reversed(rows)]
    except BaseException:
        db.close()
        raise
    return db, marks, recent
