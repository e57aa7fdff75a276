"""What the agent writes down: its log, and the list of what left the site. JSON, one line each."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROTATE_BYTES = 50 << 20

_encode = json.JSONEncoder(ensure_ascii=False, default=str).encode


class LineFile:
    """A file that lines of JSON are appended to; the one before it is kept as ``.1``.

    It stays open: opening it costs ten times what writing a line does, and a short round has ten.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file = -1
        self._node = (0, 0)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. A full disk must not end the agent, so an error is only printed."""
        with self._lock:
            try:
                text = _encode(line) + "\n"
                os.write(self._opened(), text.encode("utf-8", "backslashreplace"))
            except OSError as error:
                sys.stderr.write(f"farflung-site: {self._path.name}: {error}\n")

    def _opened(self) -> int:
        """The file, opened again if it is full, or somebody has moved or removed it."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            found = None
        if found is not None and found.st_size > ROTATE_BYTES:
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            found = None
        if self._file >= 0:
            if found is not None and (found.st_dev, found.st_ino) == self._node:
                return self._file
            os.close(self._file)
            self._file = -1
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o644)
        opened = os.fstat(self._file)
        self._node = (opened.st_dev, opened.st_ino)
        return self._file


class Journal:
    """The agent's log.

    Args:
        path: The file.
        site: Stands in every line.
        echo: Called with every line too, for a terminal.
    """

    def __init__(
        self, path: Path, site: str, echo: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self._file, self._site, self._echo = LineFile(path), site, echo

    def info(self, event: str, **facts: Any) -> None:
        """Something happened."""
        self._write("info", event, facts)

    def warning(self, event: str, **facts: Any) -> None:
        """Something happened that somebody may want to look at."""
        self._write("warning", event, facts)

    def error(self, event: str, **facts: Any) -> None:
        """Something failed."""
        self._write("error", event, facts)

    def _write(self, level: str, event: str, facts: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "level": level, "site": self._site, "event": event, **facts}
        self._file.write(line)
        if self._echo is not None:
            self._echo(line)
