"""The daemon's gateways: started, started again, ended with it."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.child import Child
from orchestrator.home import Home, split_address
from protos.errors import ComputeFailed, Unavailable

READY_S = 60.0
STOP_S = 10.0
AGAIN_S, MOST_AGAIN_S = 0.2, 5.0
"""How long to wait before one is started again: doubling while they die young."""
OLD_S = 60.0
FORMER_S = 10.0
"""How long the gateways of a daemon that was killed may take to be gone."""


def reserve(bind: str) -> socket.socket:
    """Hold a port for processes that will share it; port 0 takes a free one.

    The socket does not listen, so it gets no connection.

    Raises:
        Unavailable: Somebody else has it.
    """
    host, port = split_address(bind)
    deadline = time.monotonic() + FORMER_S
    while True:
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            with socket.socket(family, kind, protocol) as alone:
                # A shared port would be shared with strangers too, and in silence.
                alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                alone.bind(place)
                place = alone.getsockname()
            held = socket.socket(family, kind, protocol)
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            held.bind(place)
            return held
        except OSError as error:
            if time.monotonic() >= deadline:
                raise Unavailable(
                    f"gateways.bind: {bind} can't be bound ({error.strerror}); is another server"
                    " there?",
                    key="gateways.bind",
                ) from None
            time.sleep(0.05)


class Gateways:
    """Some processes ``python -m orchestrator.gateway``.

    Args:
        home: The daemon's.
        processes: How many.
        note: Called with (level, text) for what an operator should read.
    """

    def __init__(self, home: Home, processes: int, note: Callable[[str, str], None]) -> None:
        self._home, self._note = home, note
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._children: dict[int, Child] = {}
        self._ready = {number: threading.Event() for number in range(1, processes + 1)}
        self._problem: ComputeFailed | None = None
        # The kernel takes the end of the thread that started a process for the end of its parent.
        self._threads = [
            threading.Thread(target=self._keep, args=(n,), name=f"gateway-{n}", daemon=True)
            for n in self._ready
        ]

    def start(self) -> None:
        """Start them and wait until all serve.

        Raises:
            ComputeFailed: One of them ended instead; with the end of its log.
        """
        for thread in self._threads:
            thread.start()
        for ready in self._ready.values():
            ready.wait()
        if self._problem is not None:
            raise self._problem

    def stop(self) -> None:
        """End them."""
        with self._lock:
            self._ended.set()
            children = list(self._children.values())
        for child in children:
            child.terminate()
        for child in children:
            try:
                child.join(STOP_S)
            except ComputeFailed:
                child.kill()
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _keep(self, number: int) -> None:
        wait_s = AGAIN_S
        while True:
            began = time.monotonic()
            try:
                with self._lock:
                    if self._ended.is_set():
                        break
                    child = self._children[number] = self._started(number)
                child.first_line(READY_S)
                self._ready[number].set()
                child.join(threading.TIMEOUT_MAX)
                how = child.described()
            except ComputeFailed as error:
                child.kill()
                how = error.message
            except OSError as error:
                how = f"gateway {number} can't be started: {error}"
            if self._ended.is_set():
                break
            if not self._ready[number].is_set():
                self._problem = ComputeFailed(how, process=f"gateway {number}")
                break
            wait_s = AGAIN_S if time.monotonic() - began > OLD_S else wait_s
            self._note("warning", f"{how}; it is started again (log/gateway-{number}.log)")
            self._ended.wait(wait_s)
            wait_s = min(2 * wait_s, MOST_AGAIN_S)
        self._ready[number].set()

    def _started(self, number: int) -> Child:
        paths = os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path)
        return Child(
            f"gateway {number}",
            [sys.executable, "-P", "-m", "orchestrator.gateway", str(self._home.path), str(number)],
            self._home.log / f"gateway-{number}.log",
            {**os.environ, "PYTHONPATH": paths},
        )
