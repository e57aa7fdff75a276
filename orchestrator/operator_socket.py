"""Where the daemon and its operators meet: a Unix socket in the home folder."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

SOCKET_FOLDER = "run"
"""Of its own and private, so that it can be hidden from Ray and plug-ins as a whole."""
FOLDER = "run"
SOCKET_NAME = "operator.sock"
LONGEST_PATH = 100
"""`sockaddr_un` holds 108 bytes with the closing zero; the kernel refuses longer paths."""


class OperatorSocket:
    """The gRPC target of a home's socket, for either end; close it after the channel or server.

    A home deep down in a tree has a path that does not fit into a socket address. It is then
    reached through an open descriptor of the folder, ``/proc/self/fd/N``, which always fits.

    Args:
        home: The home folder; its folder ``run`` must be there.

    Attributes:
        path: The socket's file.
        target: What gRPC binds or dials.
    """

    def __init__(self, home: Path) -> None:
        self.path = home.absolute() / SOCKET_FOLDER / SOCKET_NAME
        self._folder: int | None = None
        if len(os.fsencode(self.path)) <= LONGEST_PATH:
            self.target = f"unix:{self.path}"
        else:
            self._folder = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self.target = f"unix:/proc/self/fd/{self._folder}/{SOCKET_NAME}"

    def close(self) -> None:
        """Let go of the folder."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def __enter__(self) -> OperatorSocket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
