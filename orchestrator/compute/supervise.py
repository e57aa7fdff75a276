"""Runs one function in a process that is closed off, and leaves nothing of it behind.

    caller ── supervisor ── init ── body ── whatever it starts
              (host ids)    (pid 1 of the namespace)

The supervisor watches its caller and the init by pidfd. Killing the init, which the kernel
also does when the supervisor is killed, ends every process of the namespace; that holds for
kill -9 of any of the three. Where process ids can't be separated there is no init: the
supervisor adopts orphans and kills every descendant, which survives anything but a kill -9 of
the supervisor itself (then its caller cleans up by session id, see ``end_session``).

A parent-death signal can't replace the caller's pidfd: it is sent when the *thread* that
started the process ends, and callers have threads.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from orchestrator.compute import namespaces
from orchestrator.compute.config import Level

_MAX_FD = 1024  # a process that has just started holds a handful


@dataclass(frozen=True)
class Jail:
    """What the body shall not have.

    Attributes:
        levels: What to try, in this order; ``Level.NONE`` always works.
        hidden: Folders that appear empty.
        private: A folder that becomes memory of its own and is removed at the end, or "".
        private_bytes: Its bound.
        loopback: Whether the network has a working loopback.
        keep: Capabilities that a root keeps.
    """

    levels: tuple[Level, ...]
    hidden: tuple[str, ...] = ()
    private: str = ""
    private_bytes: int = 64 * 2**20
    loopback: bool = True
    keep: frozenset[int] = field(default=frozenset())

    def enter(self, level: Level) -> None:
        """Closes off the calling process; process ids from its next child on."""
        if level is Level.NONE:
            return
        network = level is not Level.MOUNTS
        namespaces.unshare(process_ids=level is Level.NAMESPACES, network=network)
        if self.loopback and network:
            namespaces.loopback_up()
        for folder in self.hidden:
            namespaces.cover(folder)
        if self.private:
            namespaces.private_folder(self.private, self.private_bytes)


def supervise(jail: Jail, parent_pid: int, body: Callable[[Level], int]) -> NoReturn:
    """Runs ``body`` in ``jail`` and ends as it ended: same exit status, same signal.

    Args:
        jail: What to close off.
        parent_pid: The caller; when it is gone, so are we.
        body: Runs in the innermost process and returns its exit status.
    """
    if threading.active_count() != 1:
        raise RuntimeError("namespaces must be entered before any thread exists")
    for folder in jail.hidden:
        # Said here, because below it would look like a host that grants no namespaces.
        if not Path(folder).is_dir():
            raise NotADirectoryError(f"cannot hide {folder}: it is not a folder")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        parent = os.pidfd_open(parent_pid)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() != parent_pid:
        os._exit(1)
    namespaces.adopt_orphans()
    level = next(level for level in jail.levels if _granted(jail, level))
    jail.enter(level)
    child, status_fd = _start(jail, level, body)
    # A terminal's Ctrl-C is the caller's to handle: it closes our input or ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: _kill(child))
    status = _wait(parent, child, status_fd)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the child's number may be another's now
        signal.signal(number, signal.SIG_IGN)
    _end_descendants()
    if jail.private:
        with contextlib.suppress(OSError):
            namespaces.uncover(jail.private)
        shutil.rmtree(jail.private, ignore_errors=True)  # the caller may be gone
    _end_like(status)


def _granted(jail: Jail, level: Level) -> bool:
    """Tries a level in a child, since a process can't go back."""
    if level is Level.NONE:
        return True
    probe = os.fork()
    if probe == 0:
        code = 1
        with contextlib.suppress(OSError):
            jail.enter(level)
            if level is Level.NAMESPACES:
                inner = os.fork()
                if inner == 0:
                    with contextlib.suppress(OSError):
                        namespaces.mount_proc()
                        os._exit(0)
                    os._exit(1)
                code = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
            else:
                code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(probe, 0)[1]) == 0


def _start(jail: Jail, level: Level, body: Callable[[Level], int]) -> tuple[int, int]:
    """Forks the body, below an init where process ids are separate.

    Returns:
        Its process id, and a pipe from which its wait status can be read (-1: wait for it).
    """
    reader, writer = os.pipe()
    alive_reader, alive_writer = os.pipe()  # held by the supervisor: end-of-file if it is gone
    child = os.fork()
    if child:
        os.close(writer)
        os.close(alive_reader)
        if level is not Level.NAMESPACES:
            os.close(reader)
            return child, -1
        return child, reader
    namespaces.die_with_parent()
    os.close(alive_writer)
    if select.select([alive_reader], [], [], 0)[0]:  # it ended before the line above
        os._exit(1)
    # The supervisor's descriptors, too: with one for the caller, a plug-in could kill it.
    os.closerange(3, writer)
    os.closerange(writer + 1, _MAX_FD)
    if level is not Level.NAMESPACES:
        os.close(writer)
        _run(jail, level, body)
    namespaces.mount_proc()
    inner = os.fork()
    if inner == 0:
        os.close(writer)
        _run(jail, level, body)
    namespaces.drop_capabilities(jail.keep)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _let_go_of_pipes()
    while True:  # the init of a namespace is the parent of its orphans
        pid, status = os.wait()
        if pid == inner:
            os.write(writer, str(status).encode())
            os._exit(0)  # and the kernel kills whatever is left


def _run(jail: Jail, level: Level, body: Callable[[Level], int]) -> NoReturn:
    code = 70
    try:
        namespaces.drop_capabilities(jail.keep)
        code = body(level)
    except BaseException:  # noqa: BLE001 - the process ends here, whatever it was
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(parent: int, child: int, status_fd: int) -> int:
    """The wait status of the body; kills it when the parent has gone."""
    _let_go_of_pipes()
    own = os.pidfd_open(child)
    ready = select.select([parent, own], [], [])[0]
    if own not in ready:
        _kill(child)
        select.select([own], [], [])
    _, status = os.waitpid(child, 0)
    if status_fd >= 0:
        written = os.read(status_fd, 32)
        status = int(written) if written else status
    return status


def _let_go_of_pipes() -> None:
    """Lets go of the caller's pipes, so that it sees end-of-file when the body is gone."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _end_descendants() -> None:
    """Kills and reaps every descendant; orphans among them have become our children."""
    while True:
        for pid in _descendants():
            _kill(pid)
        try:
            os.wait()
        except ChildProcessError:
            return


def _descendants() -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            parents[int(entry.name)] = int(fields[1])
    found: list[int] = []
    frontier = {os.getpid()}
    while frontier := {pid for pid, parent in parents.items() if parent in frontier}:
        found += frontier
    return found


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on; ``None`` if the process has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _end_like(status: int) -> NoReturn:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        number = -code
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(max(code, 0))


def session_members(session: int) -> list[int]:
    """The living processes of a session, zombies apart."""
    members: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and fields[0] not in "ZX" and int(fields[3]) == session:
                members.append(int(entry.name))
    return members


def end_session(session: int, timeout_s: float = 10.0) -> list[int]:
    """Kills what is left of a supervisor that was started as a session of its own.

    Returns:
        Processes that are still there after ``timeout_s``; empty when all is well.
    """
    deadline = time.monotonic() + timeout_s
    while members := session_members(session):
        pidfds = []
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(pid))
            _kill(pid)
        left = deadline - time.monotonic()
        for fd in pidfds:
            select.select([fd], [], [], max(0.0, min(left, 1.0)))
            os.close(fd)
        if left <= 0:
            return members
    return []
