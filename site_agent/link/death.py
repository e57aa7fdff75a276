"""Why did the trainer end? Its signal or exit code, and whether memory was the reason."""

from __future__ import annotations

import re
import signal
from pathlib import Path

_MEMORY_WORDS = ("bad_alloc", "out of memory", "Cannot allocate memory", "MemoryError")
_FRAME = re.compile(r'File "([^"]+)", line (\d+) in ')
_LIBRARIES = ("site-packages", "/lib/python", "site_agent/trainer", "<frozen", "/strategies/")


def oom_kills() -> int:
    """How many processes the kernel has killed for memory so far, as far as one can see it."""
    return _counter(Path("/proc/vmstat"), "oom_kill") + sum(
        _counter(path, "oom_kill") for path in _memory_files()
    )


def _memory_files() -> list[Path]:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    out = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup")
        if not controllers:
            out += [root / path.lstrip("/") / "memory.events", root / "memory.events"]
        elif "memory" in controllers.split(","):
            out.append(root / "memory" / path.lstrip("/") / "memory.oom_control")
    return sorted(set(out))


def _counter(path: Path, key: str) -> int:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return 0
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name == key and value.strip().isdigit():
            return int(value)
    return 0


def cause(returncode: int, last_words: str, kills_before: int, kills_after: int) -> str:
    """What ended the trainer, as the end of a sentence that begins with "the trainer".

    Args:
        returncode: As `subprocess` gives it: negative for a signal.
        last_words: End of its log.
        kills_before: `oom_kills` when it was started.
        kills_after: The same now.
    """
    # A wrapper (torchrun, srun, a shell) gives 128 + signal.
    number = -returncode if returncode < 0 else returncode - 128 if returncode > 128 else 0
    memory = any(word in last_words for word in _MEMORY_WORDS)
    where = crash_place(last_words)
    at = f" at {where}" if where else ""
    if number:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        if number == signal.SIGKILL and kills_after > kills_before:
            return f"ran out of memory: the kernel killed it ({name})"
        if memory and number in (signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV):
            return f"ran out of memory ({name}{at})"
        return f"was killed by {name}{at}"
    if memory and returncode:
        return f"ran out of memory (exit code {returncode})"
    return f"ended with exit code {returncode}"


def crash_place(last_words: str) -> str:
    """file.py:line of the task's code in a fault handler's trace; empty if there is none."""
    start = last_words.rfind("Fatal Python error")
    if start < 0:
        return ""
    for path, line in _FRAME.findall(last_words[start:]):
        if not any(part in path for part in _LIBRARIES):
            return f"{Path(path).name}:{line}"
    return ""
