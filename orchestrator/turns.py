"""One at a time, among threads and among processes: locks on files, dropped by the kernel."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

POLL_S = 0.02


@contextmanager
def turn(path: Path, wait_s: float) -> Iterator[int | None]:
    """Have a file to oneself; gives its descriptor, None if others have it all the time.

    The one who has it may remove it, and its folder: who comes next makes them anew.

    Args:
        path: The file; made, with its folder, if it is not there.
        wait_s: How long to wait for others.
    """
    deadline = time.monotonic() + wait_s
    while (fd := _locked(path)) is None:
        if time.monotonic() >= deadline:
            yield None
            return
        _pause()
    try:
        yield fd
    finally:
        os.close(fd)


def _locked(path: Path) -> int | None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except (FileExistsError, FileNotFoundError):  # who had it removes the folder at this moment
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), path.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(fd)
    return None


def _pause() -> None:
    time.sleep(POLL_S)


class FileLock:
    """A lock among the threads of this process and the processes of this machine; may be nested.

    Args:
        path: A file that stays; made when it is first needed.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._threads = path, threading.RLock()
        self._depth, self._fd = 0, -1

    def __enter__(self) -> None:
        self._threads.acquire()
        try:
            if not self._depth:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
                fcntl.flock(self._fd, fcntl.LOCK_EX)
            self._depth += 1
        except BaseException:
            self._threads.release()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if not self._depth:
            os.close(self._fd)
        self._threads.release()
