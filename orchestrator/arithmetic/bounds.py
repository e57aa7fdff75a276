"""Bounds on a strategy's code that runs in a worker which has other work to do afterwards.

A process of its own (`Compute.isolated`) bounds anything, and takes seconds to start. What a round
asks of every calibration strategy takes milliseconds, so it is bounded where it runs: by an alarm
and by the limit on private memory. Code that never comes back to the interpreter is not stopped by
an alarm; the request's own time ends it, with its worker.
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from orchestrator.compute.functions import describe

_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory")


class OutOfBounds(BaseException):
    """Not an `Exception`: code that catches everything would catch this too."""


@contextmanager
def bounded(seconds: float, memory_bytes: int) -> Iterator[None]:
    """Let a block run for so long, and hold so much private memory more than it finds.

    Raises:
        OutOfBounds: It did not keep to that, or raised anything else; says what, in words.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = _private_bytes() + memory_bytes
    if hard != resource.RLIM_INFINITY:
        bound = min(bound, hard)
    here = threading.current_thread() is threading.main_thread()

    def ring(*_: Any) -> None:
        raise OutOfBounds(f"ran longer than its {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring) if here else None
    began, others = time.monotonic(), (0.0, 0.0)
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (bound, hard))
        if here:
            others = signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except OutOfBounds:
        raise
    except BaseException as error:
        what = describe(error)
        if isinstance(error, MemoryError) or any(w in what["message"] for w in _OUT_OF_MEMORY):
            mib = memory_bytes / 2**20
            raise OutOfBounds(f"needed more than its {mib:.0f} MiB of memory") from error
        raise OutOfBounds(f"raised {what['error']}: {what['message']} ({what['where']})") from error
    finally:
        if here:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            if others[0]:  # somebody else's alarm goes on
                left = others[0] - (time.monotonic() - began)
                signal.setitimer(signal.ITIMER_REAL, max(left, 0.001), others[1])
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _private_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
