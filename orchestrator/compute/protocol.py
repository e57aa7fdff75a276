"""The lines between the daemon and its compute process: one JSON object each.

A request and its answer, in any order and many at once::

    {"id": 7, "op": "map", "args": {…}, "timeout_s": 60.0}
    {"id": 7, "ok": true, "value": …}
    {"id": 7, "ok": false, "error": {"class": …, "message": …, "where": …, "facts": {…}}}

The process speaks first: ``{"event": "ready", "facts": {…}}`` or ``{"event": "failed", "error": …}``.
"""

from __future__ import annotations

import json
import threading
from typing import IO, Any

MAX_LINE_BYTES = 64 * 2**20


class LineTooLong(ValueError):
    """A message beyond ``MAX_LINE_BYTES``: large data belongs into files."""


class Lines:
    """Writes whole lines from many threads, reads them from one."""

    def __init__(self, reader: IO[bytes], writer: IO[bytes]) -> None:
        self._reader = reader
        self._writer = writer
        self._lock = threading.Lock()

    def send(self, message: dict[str, Any]) -> None:
        """Writes one message.

        Raises:
            LineTooLong: It is longer than ``MAX_LINE_BYTES``.
            OSError: The other end is gone.
        """
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE_BYTES:
            raise LineTooLong(f"a message of {len(line)} bytes; the limit is {MAX_LINE_BYTES}")
        with self._lock:
            self._writer.write(line)
            self._writer.flush()

    def receive(self) -> dict[str, Any] | None:
        """The next message; ``None`` at the end, also at a line that is cut or too long."""
        line = self._reader.readline(MAX_LINE_BYTES + 1)
        if not line.endswith(b"\n"):
            return None
        message: dict[str, Any] = json.loads(line)
        return message
