"""Tombstones: that something was erased, when and why, so that nobody takes it for damage."""

from __future__ import annotations

import json
import time
from pathlib import Path

from protos.chunks import sync_folder, write_durably
from protos.digest import canonical


class Tombstones:
    """A folder with one small file per erased digest.

    Args:
        folder: It must be there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def reason(self, digest: str) -> str | None:
        """Why it was erased; None if it was not."""
        try:
            return str(json.loads((self._folder / digest).read_bytes())["reason"])
        except FileNotFoundError:
            return None

    def put(self, digest: str, reason: str) -> None:
        """Remember an erasure; the first reason stays."""
        if self.reason(digest) is None:
            document = {"reason": reason, "time": time.time()}
            write_durably(self._folder / digest, canonical(document))

    def lift(self, digest: str) -> None:
        """Forget it: the bytes are back."""
        if (self._folder / digest).exists():
            (self._folder / digest).unlink(missing_ok=True)
            sync_folder(self._folder)

    def digests(self) -> list[str]:
        """All that was erased."""
        return sorted(path.name for path in self._folder.iterdir() if path.name[0] != ".")
