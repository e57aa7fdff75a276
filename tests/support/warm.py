"""A federation in which nobody waits for Ray: one that is kept outlives the daemons that are killed.

The daemon is a real one. What it asks of compute goes over a Unix socket to a process of ours, which holds a
`ComputeClient` with its Ray as the daemon otherwise would, and does it there. Together with trainers from a
`Nursery` a process that was killed is back after a second of work, and not after ten: of use where hundreds
are killed and Ray's own start is not what is looked at.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.child import Child
from orchestrator.compute import ComputeClient, ComputeConfig, errors
from orchestrator.compute.client import EventHandler
from orchestrator.compute.interface import Compute
from orchestrator.compute.protocol import Lines
from orchestrator.compute_settings import compute_config
from orchestrator.federation import DAEMON
from orchestrator.home import Home
from tests.support.faulty import FaultyFederation

DOOR = "FARFLUNG_WARM_RAY"
"""The variable that names the socket to the daemon."""
MODULE = "tests.support.warm"
START_S = 120.0


class WarmFederation(FaultyFederation):
    """See the module."""

    def configure(self) -> None:
        """Also start the Ray that is kept."""
        super().configure()
        door = self.root / "ray.sock"
        command = [sys.executable, "-m", MODULE, "ray", str(self.home.path), str(door)]
        self._ray = Child("ray", command, self.root / "log" / "ray.log", self._environment)
        self._environment[DOOR] = str(door)
        self._ray.first_line(START_S)

    def close(self) -> None:
        """End it, and the rest before."""
        super().close()
        if hasattr(self, "_ray"):
            self._ray.terminate()
            self._ray.join(START_S)

    def _start(self, name: str, command: Sequence[str]) -> Child:
        if name == DAEMON:
            words = command[command.index("serve") :]
            command = [sys.executable, "-m", MODULE, "daemon", *words]
        return super()._start(name, command)


class WarmCompute(Compute):
    """What the daemon uses in the place of a `ComputeClient`; takes the same arguments."""

    def __init__(
        self,
        config: ComputeConfig | None = None,
        *,
        log: Path | None = None,
        on_event: EventHandler | None = None,
    ) -> None:
        self._on_event = on_event

    def start(self) -> None:
        """Say that it is ready once it is; returns at once."""
        threading.Thread(target=self._tell, name="compute", daemon=True).start()

    def _tell(self) -> None:
        facts = self.wait_ready(START_S)
        if self._on_event is not None:
            self._on_event("ready", facts)

    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """Ray's facts."""
        facts: dict[str, Any] = self.call("ping", {}, timeout_s)
        return facts

    def call(self, op: str, args: dict[str, Any], timeout_s: float) -> Any:
        """One request, on a connection of its own."""
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(os.environ[DOOR])
            lines = _lines(line)
            lines.send({"from": os.getpid(), "op": op, "args": args, "timeout_s": timeout_s})
            answer = lines.receive()
        if answer is None:
            raise errors.ComputeDied(f"compute ended before it answered {op}", op=op)
        if not answer["ok"]:
            raise errors.from_json(answer["error"])
        return answer["value"]

    def stop(self) -> None:
        """It outlives the daemon."""


def _lines(line: socket.socket) -> Lines:
    return Lines(line.makefile("rb"), line.makefile("wb"))


class _Keeping:
    """The side that has Ray."""

    def __init__(self, compute: Compute, door: Path) -> None:
        self._compute = compute
        self._under_way: Counter[int] = Counter()  # requests by the daemon that made them
        self._changed = threading.Condition()
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(str(door))
        self._door.listen(64)

    def serve(self) -> None:
        """For ever."""
        while True:
            line, _ = self._door.accept()
            threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line: socket.socket) -> None:
        with line:
            lines = _lines(line)
            asked = lines.receive()
            if asked is None:
                return
            daemon = asked["from"]
            with self._changed:
                # What the one before asked for writes where this one will: it would have died with it.
                self._changed.wait_for(lambda: not (+self._under_way).keys() - {daemon})
                self._under_way[daemon] += 1
            try:
                value = self._compute.call(asked["op"], asked["args"], asked["timeout_s"])
                answer = {"ok": True, "value": value}
            except Exception as error:
                answer = {"ok": False, "error": errors.to_json(error)}
            finally:
                with self._changed:
                    self._under_way[daemon] -= 1
                    self._changed.notify_all()
            try:
                lines.send(answer)
            except OSError:
                pass  # the daemon was killed


def _keep(home: Home, door: Path) -> None:
    home.make_folders()
    with ComputeClient(compute_config(home, home.config.ray), log=home.log / "compute.log") as own:
        own.wait_ready(START_S)
        keeping = _Keeping(own, door)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        keeping.serve()


def _daemon(words: list[str]) -> None:
    from orchestrator import daemon
    from orchestrator.cli import main

    daemon.ComputeClient = WarmCompute  # type: ignore[assignment, misc]
    sys.argv = ["farflung", *words]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "ray":
        _keep(Home(Path(sys.argv[2])), Path(sys.argv[3]))
    else:
        _daemon(sys.argv[2:])
