"""Runs one plug-in function in a process of its own, with limits, and says why it failed.

The process is forked from one that has imported what plug-ins need (``zygote``). It has an empty
environment, no network (not even loopback), no folder that is ``hidden``, a bound on time and on
private memory, and ends with everything it started. It is the operator's own code, so the bounds
stop accidents and keep keys out of reach; they are no defence of a root daemon against an
attacker (docs/adr/0003).
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from orchestrator.compute import zygote
from orchestrator.compute.config import CONFINED, Level, Limits
from orchestrator.compute.supervise import end_session

_POLL_S = 0.2  # how often the memory of the process tree is summed
_STDERR_BYTES = 8192
_PASSED = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "TZ")
_OUT_OF_MEMORY = ("bad_alloc", "MemoryError", "can't allocate memory", "out of memory")


@dataclass(frozen=True)
class Cell:
    """Where plug-ins run.

    Attributes:
        hidden: Folders that they can't read.
        levels: What to try, in this order.
        reachable_keys: Run also where nothing can be hidden.
        preload: Modules that need not be imported for each of them.
    """

    hidden: tuple[str, ...] = ()
    levels: tuple[Level, ...] = CONFINED
    reachable_keys: bool = False
    preload: tuple[str, ...] = ()


def run_isolated(spec: str, text: str, limits: Limits, cell: Cell) -> dict[str, Any]:
    """Runs "module:function" in a fresh process.

    Args:
        spec: From the table of functions.
        text: The arguments, a JSON object.
        limits: Time, memory, threads.
        cell: What it shall not see.

    Returns:
        ``{"outcome": "ok", "value": …}``, or an outcome of ``raised``, ``killed``,
        ``out_of_memory``, ``timed_out`` or ``not_isolated`` with ``message`` and the facts.
    """
    order = {"spec": spec, "limits": asdict(limits), "cell": asdict(cell)}
    kind = zygote.Kind(environment(limits.threads), cell.preload)
    deadline = time.monotonic() + limits.seconds
    with tempfile.TemporaryFile() as arguments:
        arguments.write(text.encode())
        arguments.seek(0)
        try:
            sandbox = zygote.fork(kind, order, arguments, deadline)
        except TimeoutError:
            return _timed_out(limits)
        except zygote.ZygoteEnded as error:
            return _killed(error.code, "")
    watch = _Watch(sandbox, limits, deadline)
    try:
        cause = watch.until_done()
    finally:
        _end(sandbox)
    return _outcome(watch, cause, limits)


def environment(threads: int) -> dict[str, str]:
    """What a plug-in's process sees of our environment: where programs and modules are."""
    env = {name: os.environ[name] for name in _PASSED if name in os.environ}
    count = str(threads)
    return env | {
        "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path if path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
    }


class _Watch:
    """Reads what the child writes, until it ends or must be ended."""

    def __init__(self, sandbox: zygote.Sandbox, limits: Limits, deadline: float) -> None:
        self.sandbox = sandbox
        self.limits = limits
        self.deadline = deadline
        self.result = bytearray()
        self.stderr = bytearray()
        self.peak_bytes = 0

    def until_done(self) -> str:
        """Returns ``""``, or what the child was found at: a limit that it broke."""
        with selectors.DefaultSelector() as selector:
            for stream in (self.sandbox.stdout, self.sandbox.stderr):
                selector.register(stream, selectors.EVENT_READ)
            while selector.get_map():
                left = self.deadline - time.monotonic()
                if left <= 0:
                    return "timed_out"
                for key, _ in selector.select(min(left, _POLL_S)):
                    if not self._read(key.fileobj):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
                if len(self.result) > self.limits.result_bytes:
                    return "result_too_large"
                if self._memory() > self.limits.memory_bytes:
                    return "out_of_memory"
        with contextlib.suppress(TimeoutError):
            self.sandbox.wait(self.deadline - time.monotonic())
            return ""
        return "timed_out"

    def _read(self, stream: IO[bytes]) -> bool:
        data = os.read(stream.fileno(), 65536)
        if stream is self.sandbox.stdout:
            self.result += data
        else:
            self.stderr += data
            del self.stderr[:-_STDERR_BYTES]
        return bool(data)

    def _memory(self) -> int:
        """Private and shared-anonymous memory of the tree, which RLIMIT_DATA alone can't bound."""
        total = 0
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.sandbox.pid).children(recursive=True):
                with contextlib.suppress(OSError):
                    total += _anonymous_bytes(process.pid)
        self.peak_bytes = max(self.peak_bytes, total)
        return total


def _anonymous_bytes(pid: int) -> int:
    total = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:") and line.split()[2:] == ["1"]:
            return 0  # the init: it shows what it shares with the zygote and has nothing of its own
        if line.startswith(("RssAnon:", "RssShmem:", "VmSwap:")):
            total += int(line.split()[1]) * 1024
    return total


def _end(sandbox: zygote.Sandbox) -> None:
    """Ends the process with all that it started."""
    for number in (0, signal.SIGTERM, signal.SIGKILL):  # at SIGTERM it kills every descendant
        if number:
            sandbox.signal(number)
        with contextlib.suppress(TimeoutError):
            sandbox.wait(5.0 if number else 0.0)
            break
    end_session(sandbox.pid)
    sandbox.release()


def _outcome(watch: _Watch, cause: str, limits: Limits) -> dict[str, Any]:
    if cause == "timed_out":
        return _timed_out(limits)
    mib = limits.memory_bytes / 2**20
    stderr = watch.stderr.decode(errors="replace").strip()
    last_line = stderr.splitlines()[-1][:500] if stderr else ""
    found = watch.sandbox.returncode
    code = -signal.SIGKILL if found is None else found
    if cause == "result_too_large":
        message = f"wrote a result of more than {limits.result_bytes} bytes"
        return {"outcome": "killed", "message": message}
    if not cause and code == 0 and watch.result:
        return dict(json.loads(watch.result.decode()))
    aborted = code == -signal.SIGABRT and any(sign in stderr for sign in _OUT_OF_MEMORY)
    if cause == "out_of_memory" or aborted:
        message = f"needed more than its {mib:.0f} MiB of memory"
        return {"outcome": "out_of_memory", "message": message, "memory_bytes": limits.memory_bytes}
    return _killed(code, last_line)


def _timed_out(limits: Limits) -> dict[str, Any]:
    message = f"ran longer than its {limits.seconds:g} s"
    return {"outcome": "timed_out", "message": message, "seconds": limits.seconds}


def _killed(code: int, said: str) -> dict[str, Any]:
    facts: dict[str, Any]
    if code < 0:
        name = signal.Signals(-code).name
        hint = ", perhaps by the host's out-of-memory killer" if code == -signal.SIGKILL else ""
        message, facts = f"was killed by {name}{hint}", {"signal": name}
    else:
        message, facts = f"ended with status {code} and no result", {"exit_status": code}
    return {"outcome": "killed", "message": f"{message} ({said})".replace(" ()", ""), **facts}
