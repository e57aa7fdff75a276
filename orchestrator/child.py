"""A process of this machine that never outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import psutil

from protos.errors import ComputeFailed

# Runs in the new process before the command does: when its starter is gone, by whatever signal,
# the kernel tells it to end. A starter that died before the call is seen by its changed parent.
_TETHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG; survives the exec below
if os.getppid() != int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
os.execv(sys.argv[2], sys.argv[2:])
"""

TAIL_BYTES = 4000

BEGINS_S = 1.0
"""How long a search waits for the environments of processes that just begin a program."""


class Child:
    """A started process: its output goes to a log, its first lines can be waited for.

    Start it from a thread that lives as long as the child shall: the kernel counts the end of
    that thread as the end of the parent.

    Args:
        name: For messages.
        command: Program and arguments; the program is an absolute path.
        log: File to which standard output and error are appended.
        environment: Its whole environment.
        on_exit: Called from another thread when it ends, however it does.

    Attributes:
        name: As given.
        log: As given.
        pid: Process id.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        on_exit: Callable[[Child], None] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._on_exit = on_exit
        self._line: str | None = None
        self._told = threading.Event()  # a first line is there, or none will come
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TETHER, str(os.getpid()), *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(os.environ if environment is None else environment),
                start_new_session=True,  # Ctrl-C in the terminal is for us alone
            )
        self.pid = self._process.pid
        self._handle = psutil.Process(self.pid)
        self._ended = threading.Event()
        self._reader = threading.Thread(
            target=self._read, args=[self._process.stdout], name=f"log of {name}", daemon=True
        )
        self._reader.start()
        threading.Thread(target=self._wait, name=f"end of {name}", daemon=True).start()

    def _read(self, output: IO[bytes]) -> None:
        with output as lines, self.log.open("ab") as log:
            for line in lines:
                log.write(line)
                log.flush()
                if self._line is None:
                    self._line = line.decode(errors="replace").rstrip("\n")
                    self._told.set()
        self._told.set()

    def _wait(self) -> None:
        self._process.wait()
        self._ended.set()
        self._told.set()
        if self._on_exit is not None:
            self._on_exit(self)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return not self._ended.is_set()

    @property
    def exit_code(self) -> int | None:
        """How it ended (minus the signal's number for a signal); None while it runs."""
        return self._process.poll() if self._ended.is_set() else None

    def first_line(self, timeout_s: float) -> str:
        """The first line that it prints.

        Raises:
            ComputeFailed: It ended without one, or printed none in time; with the log's end.
        """
        in_time = self._told.wait(timeout_s)
        if self._line is None and in_time:
            self._ended.wait(
                1
            )  # its output ended, or it did: mostly both, one just before the other
            self._reader.join(1)
        if self._line is None:
            why = self.described() if in_time else f"{self.name} said nothing for {timeout_s:g} s"
            raise ComputeFailed(f"{why}\n{self.tail()}", process=self.name)
        return self._line

    def join(self, timeout_s: float) -> int:
        """Wait for its end.

        Returns:
            The exit code.

        Raises:
            ComputeFailed: It still runs after that time.
        """
        if not self._ended.wait(timeout_s):
            raise ComputeFailed(f"{self.name} did not end within {timeout_s:g} s\n{self.tail()}")
        return int(self._process.returncode)

    def described(self) -> str:
        """Its state in words."""
        code = self.exit_code
        if code is None:
            return f"{self.name} (process {self.pid}) runs"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{self.name} ended with {how}"

    def tail(self) -> str:
        """The end of its log."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace").strip()

    # -- ending it -----------------------------------------------------------------------------

    def tree(self) -> list[psutil.Process]:
        """This process and all its descendants, as they are now."""
        try:
            return [self._handle, *self._handle.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def terminate(self) -> None:
        """Ask it to end; its descendants are its own business."""
        if self.alive:
            self._process.terminate()

    def kill(self) -> None:
        """End it and all its descendants at once, this process first, and wait for it."""
        family = self.tree()
        if self.alive:
            self._process.kill()
        end_at_once(family)
        self._ended.wait(10)


def end_at_once(processes: Iterable[psutil.Process], timeout_s: float = 10.0) -> None:
    """Kill processes and wait until they are gone; ids that were given anew are left alone."""
    processes = list(processes)
    for process in processes:
        try:
            process.kill()  # psutil compares the start time first
        except psutil.NoSuchProcess:
            continue
    wait_gone(processes, timeout_s)


def wait_gone(processes: Iterable[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until processes have ended; gives those that have not. Zombies have ended."""
    deadline = time.monotonic() + timeout_s
    left = [process for process in processes if runs(process)]
    while left and time.monotonic() < deadline:
        psutil.wait_procs(left, timeout=min(0.05, timeout_s))
        left = [process for process in left if runs(process)]
    return left


def runs(process: psutil.Process) -> bool:
    """Whether a process still does something: neither gone nor a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def marked(variable: str, value: str) -> list[psutil.Process]:
    """All processes of this user whose environment holds that variable with that value."""
    found, until = [], time.monotonic() + BEGINS_S
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and _environment(process, until).get(variable) == value:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # gone, or another user's
    return found


def _environment(process: psutil.Process, until: float) -> dict[str, str]:
    """Its environment, which is empty at first of a process that just begins a program."""
    while not (found := process.environ()) and time.monotonic() < until:
        if not process.exe():
            break  # of the kernel: it has none
        time.sleep(0.001)
    return found


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold Ctrl-C and its kin off while processes are ended; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def program(command: str, module: str) -> list[str]:
    """An installed command of this Python's environment, or the same by its module."""
    script = Path(sys.executable).parent / command
    if script.is_file():
        return [str(script)]
    return [sys.executable, "-c", f"from {module} import main; main()"]
