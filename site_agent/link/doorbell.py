"""A Unix socket in the site's folder, where a running agent answers the command line."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protos.errors import FarflungError, InvalidInput
from protos.faults import reach
from site_agent.link.journal import Journal

MAX_REQUEST_BYTES = 64 << 10
TIMEOUT_S = 5.0

Answer = Callable[[str, dict[str, Any]], dict[str, Any]]


class Doorbell:
    """Answers requests of one line of JSON each, ``{"op": …}``, with one line.

    Args:
        path: The socket; its folder must be private.
        answer: Gives the answer to an operation and its arguments.
        journal: Log.
    """

    def __init__(self, path: Path, answer: Answer, journal: Journal) -> None:
        self._path, self._answer, self._journal = path, answer, journal
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        # A socket's path may have 107 bytes at most, a folder's any number: go through /proc.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._socket.bind(f"/proc/self/fd/{folder}/{path.name}")
        finally:
            os.close(folder)
        path.chmod(0o600)
        self._socket.listen(8)
        reach("doorbell.bound")

    def run(self) -> None:
        """Answer until closed."""
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def close(self) -> None:
        """End the thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.settimeout(TIMEOUT_S)
            try:
                with connection.makefile("rwb") as lines:
                    reply = self._reply(lines.readline(MAX_REQUEST_BYTES))
                    lines.write(json.dumps(reply).encode() + b"\n")
            except OSError as error:
                self._journal.warning("a caller went away", reason=str(error))

    def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            op = request.pop("op")
        except (ValueError, KeyError, AttributeError):
            return _error(InvalidInput("not a request"))
        try:
            return {"ok": self._answer(str(op), request)}
        except FarflungError as error:
            return _error(error)


def _error(error: FarflungError) -> dict[str, Any]:
    return {"error": type(error).__name__, "message": error.message}
