"""Disks that fill up, and disks that lie: a small file system under a folder, a bit flipped in a file.

The small file system is a tmpfs, so it needs the right to mount (`small_disks_possible`). Where a test
can't have one, `Fault(at, do="raise")` makes a named write fail with ENOSPC or any other error instead.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from pathlib import Path

FILLER = ".filler"
PIECE_BYTES = 1 << 20


def small_disks_possible() -> str:
    """Empty where this process may mount a tmpfs, else why not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            mount(Path(folder), 1 << 20)
        except RuntimeError as error:
            return str(error)
        unmount(Path(folder))
    return ""


def mount(folder: Path, nbytes: int) -> None:
    """Put a file system of that size over a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _do("mount", "-t", "tmpfs", "-o", f"size={nbytes},mode=0700", "farflung-test", str(folder))


def unmount(folder: Path) -> None:
    """Take it away; what still has a file open there keeps it until its end."""
    _do("umount", "--lazy", str(folder))


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")


def fill(folder: Path, leave_bytes: int = 0) -> None:
    """Take all the room of the file system that a folder is on, but for so much."""
    filler = folder / FILLER
    with filler.open("ab", buffering=0) as file:
        while (piece := min(PIECE_BYTES, _room(folder) - leave_bytes)) > 0:
            try:
                file.write(bytes(piece))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                return


def empty(folder: Path) -> None:
    """Give back what was taken."""
    (folder / FILLER).unlink(missing_ok=True)


def _room(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def flip(path: Path, at: int | None = None) -> int:
    """Flip one bit of a file, as a disk does that lies: its times stay as they are.

    Args:
        path: The file; not an empty one.
        at: Which byte; the one in the middle by default.

    Returns:
        Which byte it was.
    """
    before = path.stat()
    where = before.st_size // 2 if at is None else at
    with path.open("r+b") as file:
        file.seek(where)
        byte = file.read(1)[0]
        file.seek(where)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return where
