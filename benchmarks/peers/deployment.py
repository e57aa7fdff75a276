"""The processes of a peer on this machine: none of them outlives the measurement."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from socket import create_connection
from types import TracebackType

import psutil

from orchestrator.child import Child, end_at_once, marked, undisturbed
from protos.errors import ComputeFailed, DeadlineExceeded, OutOfSpace

MARK = "FARFLUNG_PEER"
"""Every process of a peer carries this variable, so that none is overlooked at the end."""

COMMAND_S = 180.0
LOOK_EVERY_S = 0.2
LEAST_FREE_BYTES = 1.5e9
TAIL = 2000


class Deployment:
    """A peer's processes, ended with all their descendants when the block is left.

    Args:
        folder: For homes and logs.
        environment: The peer's virtual environment.
    """

    def __init__(self, folder: Path, environment: Path) -> None:
        self.folder = folder
        self._bin = environment.absolute() / "bin"
        self._mark = secrets.token_hex(8)
        self._children: dict[str, Child] = {}

    def __enter__(self) -> Deployment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with undisturbed():
            for child in self._children.values():
                child.kill()
            end_at_once(marked(MARK, self._mark))

    @property
    def pids(self) -> dict[str, int]:
        """The started processes."""
        return {name: child.pid for name, child in self._children.items()}

    def start(
        self, name: str, command: Sequence[str], variables: Mapping[str, str] | None = None
    ) -> None:
        """Start a process.

        Args:
            name: Of it and its log.
            command: Its program is a path, or a name in the peer's environment.
            variables: More of them.
        """
        log = self.folder / f"{name}.log"
        words = [str(self._bin / command[0]), *command[1:]]
        self._children[name] = Child(name, words, log, self._variables(variables))

    def run(
        self,
        command: Sequence[str],
        folder: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> str:
        """Run a command to its end.

        Returns:
            What it printed.

        Raises:
            ComputeFailed: Its exit code is not 0, or it takes too long.
        """
        try:
            done = subprocess.run(
                [str(self._bin / command[0]), *command[1:]],
                cwd=folder or self.folder,
                env=self._variables(variables),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=COMMAND_S,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            code, end = error.returncode, error.stdout[-TAIL:]
            raise ComputeFailed(f"{' '.join(command)}: exit code {code}\n{end}") from error
        except subprocess.TimeoutExpired as error:
            raise ComputeFailed(f"{' '.join(command)}: no end in {COMMAND_S:g} s") from error
        return done.stdout

    def until(self, happened: Callable[[], bool], what: str, timeout_s: float) -> None:
        """Wait for something that the processes do.

        Raises:
            ComputeFailed: One of the processes ended instead.
            OutOfSpace: The machine runs out of memory.
            DeadlineExceeded: It did not happen in time.
        """
        end = time.monotonic() + timeout_s
        while not happened():
            for child in self._children.values():
                if not child.alive:
                    raise ComputeFailed(f"{child.described()}\n{child.tail()}", process=child.name)
            if psutil.virtual_memory().available < LEAST_FREE_BYTES:
                raise OutOfSpace(f"given up: under {LEAST_FREE_BYTES / 1e9:g} GB of memory left")
            if time.monotonic() > end:
                raise DeadlineExceeded(f"not in {timeout_s:g} s: {what}\n{self._tails()}")
            time.sleep(LOOK_EVERY_S)

    def listening(self, port: int) -> bool:
        """Whether somebody accepts connections there."""
        try:
            create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return False
        return True

    def version(self, distribution: str) -> str:
        """The installed version of a distribution."""
        script = f"from importlib.metadata import version; print(version({distribution!r}))"
        return self.run(["python", "-c", script]).strip()

    def _variables(self, more: Mapping[str, str] | None) -> dict[str, str]:
        home = self.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        return {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{self._bin}{os.pathsep}{os.environ.get('PATH', '')}",
            MARK: self._mark,
            **(more or {}),
        }

    def _tails(self) -> str:
        return "\n".join(f"{name}: {child.tail()}" for name, child in self._children.items())
