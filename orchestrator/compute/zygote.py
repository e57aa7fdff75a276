"""A process that has torch imported already, and from which sandboxes are forked.

    caller ── zygote ── supervisor of a sandbox ── …
              (imports, nothing else)

Starting Python and importing torch takes longer than most plug-ins run. A zygote does it once;
a fork of it costs some milliseconds, and its memory is shared until somebody writes. It runs none
of the operator's code, so every plug-in starts from the same state, and it has read no key. It
has one sandbox at a time, and ends when its caller has gone or has wanted nothing for a while; a
sandbox ends with its zygote (``supervise``).
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

MESSAGE_BYTES = 1 << 16
_PROGRAM = "orchestrator.compute.sandbox_child"
_GRACE_S = 0.2


class ZygoteEnded(Exception):
    """It ended before it forked.

    Attributes:
        code: Its exit status, or minus a signal.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"ended with {code}")
        self.code = code


@dataclass(frozen=True)
class Kind:
    """What zygotes differ in.

    Attributes:
        environment: Of its process, and so of its sandboxes.
        preload: Modules that it imports.
    """

    environment: Mapping[str, str]
    preload: tuple[str, ...]


class Sandbox:
    """A forked process, much as `subprocess.Popen` shows a child.

    Attributes:
        pid: Of its supervisor, which leads a session of its own.
        stdout: Its result.
        stderr: What it says.
        returncode: None until it is known to have ended; minus the signal if one ended it.
    """

    def __init__(self, zygote: _Zygote, pid: int, stdout: IO[bytes], stderr: IO[bytes]) -> None:
        self.pid, self.stdout, self.stderr = pid, stdout, stderr
        self.returncode: int | None = None
        self._zygote = zygote

    def wait(self, timeout_s: float) -> int:
        """Its return code.

        Raises:
            TimeoutError: It runs still.
        """
        if self.returncode is None:
            said = self._zygote.hear(timeout_s)
            # With its zygote it is killed, too.
            self.returncode = int(said) if said else -signal.SIGKILL
        return self.returncode

    def signal(self, number: int) -> None:
        """Send it a signal if it is not known to have ended; till then nobody else has its number."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def release(self) -> None:
        """Close its streams; its zygote is there for the next one, or ends if this has not ended."""
        self.stdout.close()
        self.stderr.close()
        if self.returncode is None:
            self._zygote.end()
        else:
            _keep(self._zygote)


class _Zygote:
    """The caller's end."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _PROGRAM, *kind.preload],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=dict(kind.environment),
                cwd="/",
                start_new_session=True,
            )

    def fork(self, order: Mapping[str, Any], arguments: IO[bytes], timeout_s: float) -> Sandbox:
        """A sandbox that carries out an order.

        Raises:
            TimeoutError: The zygote is not ready in the time.
            ZygoteEnded: It has ended.
        """
        with contextlib.ExitStack() as ours:
            streams = []
            with contextlib.ExitStack() as theirs:
                fds = [arguments.fileno()]
                for _ in range(2):
                    reader, writer = os.pipe()
                    streams.append(ours.enter_context(os.fdopen(reader, "rb", 0)))
                    theirs.callback(os.close, writer)
                    fds.append(writer)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    socket.send_fds(self._link, [json.dumps(order).encode()], fds)
                pid = self.hear(timeout_s)
            if not pid:
                raise ZygoteEnded(self.end())
            ours.pop_all()
        return Sandbox(self, int(pid), *streams)

    def hear(self, timeout_s: float) -> str:
        """Its next message; empty if it has ended.

        Raises:
            TimeoutError: There is none in the time.
        """
        self._link.settimeout(max(1e-3, timeout_s))
        with contextlib.suppress(ConnectionResetError):
            return self._link.recv(MESSAGE_BYTES).decode()
        return ""

    def end(self) -> int:
        """Ends it, and its sandbox with it; gives how it ended."""
        self._link.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            # One that has nothing to do ends by itself, and one that crashed says how.
            return int(self._process.wait(_GRACE_S))
        self._process.kill()
        return int(self._process.wait())


_lock = threading.Lock()
_spare: _Zygote | None = None


def fork(kind: Kind, order: Mapping[str, Any], arguments: IO[bytes], deadline: float) -> Sandbox:
    """A sandbox that carries out an order, from the zygote that is there or from a new one.

    Args:
        kind: Of the zygote.
        order: ``spec``, ``limits`` and ``cell`` of ``sandbox.run_isolated``.
        arguments: The sandbox's standard input.
        deadline: By the monotonic clock.

    Raises:
        TimeoutError: It was not forked by then.
        ZygoteEnded: A new zygote crashed, importing perhaps.
    """
    global _spare
    with _lock:
        zygote, _spare = _spare, None
    if zygote is not None:
        try:
            if zygote.kind == kind:
                return zygote.fork(order, arguments, deadline - time.monotonic())
            zygote.end()
        except ZygoteEnded:
            pass
        except TimeoutError:
            zygote.end()
            raise
    zygote = _Zygote(kind)
    try:
        return zygote.fork(order, arguments, deadline - time.monotonic())
    except TimeoutError:
        zygote.end()
        raise


def _keep(zygote: _Zygote | None) -> None:
    global _spare
    with _lock:
        other, _spare = _spare, zygote
    if other is not None:
        other.end()


atexit.register(_keep, None)
