"""The progress log: numbers at once, batches on disk, nothing given twice."""

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.ledger import EventLog, events
from orchestrator.views import Event

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "progress.sqlite"


@pytest.fixture
def log(path: Path) -> Iterator[EventLog]:
    log = EventLog(path)
    yield log
    log.close()


def event(text: str, run: str = "r1") -> Event:
    return Event(number=0, time=1.0, kind="log", run=run, text=text)


def texts(found: list[Event]) -> list[str]:
    return [one.text for one in found]


def test_events_get_numbers_and_come_back(log: EventLog) -> None:
    assert log.last_number() == 0
    first = log.append(event("a"))
    assert log.append(event("b", "r2")) == first + 1
    assert log.append(event("c")) == first + 2 == log.last_number()
    assert texts(log.after(0)) == ["a", "b", "c"]
    assert texts(log.after(first)) == ["b", "c"]
    assert texts(log.after(0, run="r1")) == ["a", "c"]
    assert texts(log.after(0, limit=2)) == ["a", "b"]
    assert log.after(log.last_number()) == []
    assert [one.number for one in log.after(first)] == [first + 1, first + 2]


def test_events_survive_and_numbers_go_on(path: Path) -> None:
    log = EventLog(path)
    last = [log.append(event(f"{n}")) for n in range(10)][-1]
    log.close()
    log = EventLog(path)
    assert texts(log.after(last - 3)) == ["7", "8", "9"]
    assert log.append(event("next")) == last + 1
    log.flush()
    log.close()


def test_what_memory_forgot_comes_from_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "RECENT_EVENTS", 4)
    log = EventLog(path)
    for n in range(10):
        log.append(event(f"{n}", "even" if n % 2 == 0 else "odd"))
    log.flush()
    assert texts(log.after(0)) == [f"{n}" for n in range(10)]
    assert texts(log.after(2, limit=3)) == ["2", "3", "4"]
    assert texts(log.after(0, run="even")) == ["0", "2", "4", "6", "8"]
    log.close()


def test_old_events_are_removed(path: Path) -> None:
    log = EventLog(path, keep=100)
    for n in range(250):
        log.append(event(f"{n}"))
    log.close()
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM events").fetchone() == (100,)
    db.close()


def test_waiting_ends_with_news_or_with_time(log: EventLog) -> None:
    assert not log.wait(0, timeout=0.01)
    threading.Timer(0.05, log.append, [event("news")]).start()
    assert log.wait(0, timeout=30)
    assert log.wait(0, timeout=0)
    assert not log.wait(log.last_number(), timeout=0)


def test_heartbeats_tell_how_long_the_daemon_was_down(path: Path) -> None:
    log = EventLog(path)
    assert log.last_heartbeat() is None
    log.heartbeat(100.0)
    log.heartbeat(105.5)
    log.close()
    log = EventLog(path)
    assert log.last_heartbeat() == 105.5
    log.heartbeat(200.0)
    assert log.last_heartbeat() == 200.0
    log.close()


def test_a_damaged_file_is_put_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"damage" * 1000)
    log = EventLog(path)
    assert "can't be read" in caplog.text
    # Whoever followed the log before must not wait for numbers that it has seen already.
    assert log.append(event("fresh")) > 1_000_000
    log.close()
    assert len(list(path.parent.glob("progress.sqlite.damaged-*"))) == 1


def test_a_disk_that_fails_loses_history_and_nothing_else(
    log: EventLog, caplog: pytest.LogCaptureFixture
) -> None:
    log._db.execute("DROP TABLE marks")
    log.append(event("a"))
    log.heartbeat(1.0)
    log.flush()
    assert "were not written" in caplog.text
    assert texts(log.after(0)) == ["a"]


KILLED = """
import os, signal, sys
from pathlib import Path
from orchestrator.ledger import EventLog
from orchestrator.views import Event
log = EventLog(Path(sys.argv[1]))
for n in range(20):
    number = log.append(Event(number=0, time=1.0, kind="log", text=str(n)))
    if n == 9:
        log.flush()
print(number, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_number_is_given_twice_across_a_kill(path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    log = EventLog(path)
    assert texts(log.after(0))[:10] == [f"{n}" for n in range(10)]
    assert log.append(event("after")) > int(done.stdout)
    log.close()


def test_an_event_does_not_wait_for_the_disk(log: EventLog) -> None:
    with log._disk:
        began = time.monotonic()
        for n in range(100):
            log.append(event(f"{n}"))
        assert time.monotonic() - began < 5
    assert len(log.after(0)) == 100
