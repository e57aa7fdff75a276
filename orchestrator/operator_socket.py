"""Where the daemon and its operators meet, and its gateways: Unix sockets in the home folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import grpc

from protos.rpc import ErrorInterceptor

SOCKET_FOLDER = "run"
"""Of its own and private, so that it can be hidden from Ray and plug-ins as a whole."""
FOLDER = "run"
SOCKET_NAME = "operator.sock"
GATEWAY = "gateway.sock"
THREADS = 64
LONGEST_PATH = 100
"""`sockaddr_un` holds 108 bytes with the closing zero; the kernel refuses longer paths."""


class OperatorSocket:
    """The gRPC target of one of a home's sockets, for either end; close it after channel or server.

    A home deep down in a tree has a path that does not fit into a socket address. It is then
    reached through an open descriptor of the folder, ``/proc/self/fd/N``, which always fits.

    Args:
        home: The home folder; its folder ``run`` must be there.
        name: Which one.

    Attributes:
        path: The socket's file.
        target: What gRPC binds or dials.
    """

    def __init__(self, home: Path, name: str = SOCKET_NAME) -> None:
        self.path = home.absolute() / SOCKET_FOLDER / name
        self._folder: int | None = None
        if len(os.fsencode(self.path)) <= LONGEST_PATH:
            self.target = f"unix:{self.path}"
        else:
            self._folder = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self.target = f"unix:/proc/self/fd/{self._folder}/{name}"

    def serve(self, add: Callable[[grpc.Server], None]) -> grpc.Server:
        """Start a server on it, for this user alone.

        Args:
            add: Adds the service.
        """
        self.path.unlink(missing_ok=True)
        server = grpc.server(
            ThreadPoolExecutor(THREADS, thread_name_prefix=f"{self.path.stem}-rpc"),
            interceptors=[ErrorInterceptor()],
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
            ],
        )
        add(server)
        before = os.umask(0o177)
        try:
            server.add_insecure_port(self.target)
            server.start()
        finally:
            os.umask(before)
        return server

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
