"""Trainers that are forked from one process, so that 64 of them fit into one machine's memory.

torch is 220 MB of memory that no two processes share, because each builds it for itself. At a site
there is one trainer, and it does not matter. Where a bench has many sites on one machine, their
trainers are forked from a process that has loaded torch: each is still a process of its own, runs
``python -m site_agent.trainer``, and shares what it does not change.

The link starts what ``trainer.command`` says: here a small program that hands its own stdin, stdout
and stderr over a Unix socket, and ends as the trainer does.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import threading
from pathlib import Path

from orchestrator.child import Child

LOADED = ("torch", "torch._dynamo", "torch.optim", "site_agent.trainer.server")
"""What every trainer has loaded after its first round, tasks and strategies aside."""

START_S = 120.0

# Runs in the process that the link starts: no import of ours, it is to be small.
CLIENT = """
import array, json, os, signal, socket, sys
door = socket.socket(socket.AF_UNIX)
door.connect(sys.argv[1])
words = json.dumps({"cwd": os.getcwd(), "argv": sys.argv[2:], "environment": dict(os.environ)})
descriptors = array.array("i", [0, 1, 2])
door.sendmsg([len(words).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
door.sendall(words.encode())
for number in (0, 1):
    os.close(number)
code = (door.recv(1) or bytes([1]))[0]
if code > 128:
    os.kill(os.getpid(), code - 128)
sys.exit(code)
"""


class Nursery:
    """The process that trainers are forked from.

    Args:
        folder: For its socket and its log.
    """

    def __init__(self, folder: Path) -> None:
        self._socket = folder / "nursery.sock"
        command = [sys.executable, "-m", "orchestrator.bench.nursery", str(self._socket)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._child = Child("nursery", command, folder / "nursery.log", environment)
        self._child.first_line(START_S)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    @property
    def command(self) -> list[str]:
        """What a link starts as its trainer."""
        return [sys.executable, "-I", "-S", "-c", CLIENT, str(self._socket)]

    def close(self) -> None:
        """End it, and every trainer."""
        self._child.kill()


def _serve(path: Path) -> None:
    for name in LOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the collector would write into pages that are shared
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(path))
    door.listen(256)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        caller, _ = door.accept()
        head, descriptors, _, _ = socket.recv_fds(caller, 4, 3)
        words = b""
        while len(words) < int.from_bytes(head, "big"):
            words += caller.recv(65536)
        pid = os.fork()
        if pid == 0:
            door.close()
            caller.close()
            _become_trainer(descriptors, json.loads(words))
        for descriptor in descriptors:
            os.close(descriptor)
        threading.Thread(target=_see_off, args=(pid, caller), daemon=True).start()


def _become_trainer(descriptors: list[int], told: dict[str, object]) -> None:
    code = 1
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.environ.clear()
        os.environ.update(told["environment"])  # type: ignore[call-overload]
        os.chdir(str(told["cwd"]))
        sys.argv = ["site_agent.trainer", *told["argv"]]  # type: ignore[misc]
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, closefd=False)
            for number, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        runpy.run_module("site_agent.trainer", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def _see_off(pid: int, caller: socket.socket) -> None:
    """Tell the client how its trainer ended; end the trainer when its client is gone."""

    def end_with_client() -> None:
        if not caller.recv(1):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    watch = threading.Thread(target=end_with_client, daemon=True)
    watch.start()
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    try:
        caller.send(bytes([code if 0 <= code < 256 else 128 - code]))
        caller.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the link has ended it
    watch.join()
    caller.close()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
