"""Wall clocks that a test can turn while their processes run, each end's own.

Only the wall clock: sleeps, time-outs and the monotonic clock go on, as on a machine whose clock is set, and
the times of files are the machine's. A library of fifty lines of C is preloaded (clock.c), which needs a
compiler, ``cc``. libfaketime would do the same, but not here: its version 0.9.10 makes every `time.sleep` of
Python 3.11 fail where the monotonic clock is left alone.
"""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
VARIABLE = "FARFLUNG_TEST_CLOCK"


@functools.cache
def clocks_possible() -> str:
    """Empty where clocks can be turned, else why not."""
    if shutil.which("cc") is None:
        return "there is no C compiler (Debian: gcc, libc6-dev)"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _build(Path(folder) / "clock.so")
        except RuntimeError as error:
            return str(error)
    return ""


def _build(path: Path) -> None:
    words = ["cc", "-shared", "-fPIC", "-O2", "-o", str(path), str(SOURCE), "-ldl"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


class Clock:
    """The wall clock of the processes that are started with its `variables`.

    Args:
        folder: For the library and the file in which stands how far the clock is ahead.

    Raises:
        RuntimeError: The library can't be built.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._library, self._file = folder / "clock.so", folder / "ahead"
        _build(self._library)
        self._file.write_bytes(bytes(8))

    @property
    def variables(self) -> dict[str, str]:
        """For the environment of a process."""
        return {"LD_PRELOAD": str(self._library), VARIABLE: str(self._file)}

    def turn(self, seconds: float) -> None:
        """From now on the clock is so much ahead of the machine's (behind, if negative)."""
        fd = os.open(self._file, os.O_WRONLY)  # in place: processes have it mapped
        try:
            os.pwrite(fd, struct.pack("=q", round(seconds * 1e9)), 0)
        finally:
            os.close(fd)
