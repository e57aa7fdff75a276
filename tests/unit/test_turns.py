"""Locks on files: between threads, between processes, and when one of those is killed."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from orchestrator.turns import FileLock, turn

CONTEXT = multiprocessing.get_context("spawn")
WAIT_S = 20.0


def hold(path: str, pipe: Connection) -> None:
    with turn(Path(path), WAIT_S) as fd:
        pipe.send(fd is not None)
        pipe.recv()


def hold_lock(path: str, pipe: Connection) -> None:
    with FileLock(Path(path)):
        pipe.send(True)
        pipe.recv()


def holder(target: Callable[[str, Connection], None], path: Path) -> tuple[int, Connection]:
    """Another process that has it; ends with this one's end of the pipe."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=target, args=(str(path), theirs), daemon=True)
    process.start()
    theirs.close()
    assert ours.recv()
    assert process.pid is not None
    return process.pid, ours


def test_one_at_a_time_also_within_a_process(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "turn"
    with turn(path, 0) as one, turn(path, 0) as two:
        assert one is not None
        assert two is None
    with turn(path, 0) as one:
        assert one is not None


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    path = tmp_path / "turn"
    pid, pipe = holder(hold, path)
    with turn(path, 0) as fd:
        assert fd is None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EOFError):
        pipe.recv()
    with turn(path, WAIT_S) as fd:
        assert fd is not None


def test_whoever_waited_for_a_folder_that_went_has_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "turn"
    waits, got = threading.Event(), threading.Event()
    monkeypatch.setattr("orchestrator.turns._pause", waits.set)

    def wait() -> None:
        with turn(path, WAIT_S) as fd:
            if fd is not None and os.path.samestat(os.fstat(fd), path.stat()):
                got.set()

    thread = threading.Thread(target=wait)
    with turn(path, 0):
        thread.start()
        assert waits.wait(WAIT_S)
        path.unlink()
    thread.join()
    assert got.is_set()


def test_a_lock_may_be_nested_and_keeps_processes_out(tmp_path: Path) -> None:
    lock, path = FileLock(tmp_path / "lock"), tmp_path / "lock"
    with lock, lock:
        pass
    pid, _ = holder(hold_lock, path)
    got = threading.Event()

    def take() -> None:
        with lock:
            got.set()

    thread = threading.Thread(target=take)
    thread.start()
    assert not got.is_set()
    os.kill(pid, signal.SIGKILL)
    assert got.wait(WAIT_S)
    thread.join()
