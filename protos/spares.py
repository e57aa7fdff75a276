"""Spare files: bytes that nobody needs any more, kept to be written over.

Writing 1 GB into pages that a file already has costs a fraction of what fresh pages cost
(docs/evidence.md). A spare is therefore renamed to where the next transfer is written, and is cut to
its size. What must really go (an erasure, a run that a site forgets) is removed, never given here.
"""

from __future__ import annotations

import os
from pathlib import Path

from protos.faults import reach

LEAST_BYTES = 1 << 20
"""A smaller file costs less than to look for a spare."""


class Spares:
    """A folder of spare files; several processes may use it at once.

    Args:
        folder: On the file system where the files will be used; made if it is not there.
        most: How many files are kept at most.

    Attributes:
        folder: As given.
    """

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self._most = folder, most
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def give(self, path: Path) -> None:
        """Keep a file that is not needed any more, or remove it where there are enough."""
        try:
            if path.stat().st_size < LEAST_BYTES or len(self._found()) >= self._most:
                path.unlink()
                reach("spare.refused")
            else:
                path.rename(self.folder / f"{os.getpid()}-{os.urandom(8).hex()}")
                reach("spare.given")
        except FileNotFoundError:
            return

    def take(self, path: Path, nbytes: int) -> bool:
        """Move the spare that fits best to a path where nothing is; whether there was one."""
        if nbytes < LEAST_BYTES:
            return False
        found = self._found()
        fitting = [entry for entry in found if entry[0] >= nbytes]
        for _, spare in [*fitting, *reversed(found)]:
            try:
                spare.rename(path)
                reach("spare.taken")
                return True
            except FileNotFoundError:  # another process took it
                continue
        return False

    def clear(self) -> int:
        """Remove all; gives their bytes."""
        freed = 0
        for size, spare in self._found():
            spare.unlink(missing_ok=True)
            freed += size
        return freed

    def _found(self) -> list[tuple[int, Path]]:
        """Size and path, smallest first."""
        found = []
        for path in self.folder.iterdir():
            try:
                found.append((path.stat().st_size, path))
            except FileNotFoundError:
                continue
        return sorted(found)
