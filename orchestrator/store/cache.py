"""Files of this machine with bytes that lie elsewhere: each fetched once for all who want it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

Fetch = Callable[[Path], None]
"""Writes the bytes to a path where nothing is."""


class Cache:
    """A folder of bounded size; what was not used for the longest goes first.

    The daemon begins with an empty one: nothing in it was made durable, so nothing outlives a power cut
    half written. Its gateways use the same folder; each fetches for itself what none has finished.

    Args:
        folder: Of its own.
        most: Bytes that it holds at most; a single file may be larger.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self._folder, self._most = folder, most
        self._lock = threading.Lock()
        self._fetching: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        folder.mkdir(exist_ok=True)

    def file(self, name: str, fetch: Fetch) -> Path:
        """A file, fetched if it is not here; whoever wants the same one meanwhile waits for it."""
        path = self._folder / name
        with self._lock:
            fetching = self._fetching[name]
        with fetching:
            try:
                os.utime(path)
            except FileNotFoundError:
                part = path.with_name(f"{name}.{os.getpid()}.part")
                try:
                    fetch(part)
                    self.add(name, part)
                finally:
                    part.unlink(missing_ok=True)
        return path

    def lend(self, name: str, fetch: Fetch, folder: Path) -> Path:
        """The same under a second name in a folder, where it stays when it goes from here."""
        lent = folder / name
        while not lent.exists():
            path = self.file(name, fetch)
            try:
                os.link(path, lent)
            except FileNotFoundError:  # it went between the two lines
                continue
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                shutil.copyfile(path, lent)
        return lent

    def find(self, name: str) -> Path | None:
        """A file, if it is here."""
        path = self._folder / name
        return path if path.exists() else None

    def add(self, name: str, file: Path) -> None:
        """Take a file in."""
        with self._lock:
            os.utime(file)
            file.rename(self._folder / name)
            self._trim(self._most, name)

    def take(self, name: str) -> Path | None:
        """A file that is going and that nobody else reads; None if there is no such."""
        path = self._folder / name
        try:
            return path if path.stat().st_nlink == 1 else None
        except FileNotFoundError:
            return None

    def drop(self, name: str) -> None:
        """Remove a file if it is here."""
        (self._folder / name).unlink(missing_ok=True)
        with self._lock:
            self._fetching.pop(name, None)

    def clear(self, unfinished: bool = False) -> int:
        """Remove all, what is being fetched too if that is wanted; gives their bytes."""
        with self._lock:
            return self._trim(0, "", unfinished)

    def _trim(self, most: int, kept: str, unfinished: bool = False) -> int:
        files = []
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):  # another process removed it
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        freed = 0
        for _, size, path in sorted(files):
            if total - freed <= most:
                break
            if path.name != kept and (unfinished or path.suffix != ".part"):
                path.unlink(missing_ok=True)
                freed += size
        return freed
