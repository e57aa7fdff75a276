"""A store over another: what is read may be of either, what is written stays in a folder of its own."""

from __future__ import annotations

from pathlib import Path

from orchestrator.store.store import Store
from protos.errors import NotFound
from protos.manifest import Index, Manifest


class Overlay(Store):
    """See the module. Whoever throws the folder away leaves the store below as it was.

    Args:
        root: The folder for what is written.
        below: The store that is only read.
    """

    def __init__(self, root: Path, below: Store) -> None:
        super().__init__(root)
        self._below = below

    def manifest(self, digest: str) -> Manifest:
        """See `Store.manifest`."""
        try:
            return super().manifest(digest)
        except NotFound:
            return self._below.manifest(digest)

    def get_bytes(self, digest: str) -> bytes:
        """See `Store.get_bytes`."""
        try:
            return super().get_bytes(digest)
        except NotFound:
            return self._below.get_bytes(digest)

    def index(self, digest: str) -> Index:
        """See `Store.index`."""
        return super().index(digest) if digest in self else self._below.index(digest)

    def path(self, digest: str) -> Path:
        """See `Store.path`."""
        return super().path(digest) if digest in self else self._below.path(digest)

    def lend(self, digest: str, folder: Path) -> Path:
        """See `Store.lend`."""
        return super().lend(digest, folder) if digest in self else self._below.lend(digest, folder)

    def place(self, digest: str, folder: Path) -> str:
        """See `Store.place`."""
        mine = digest in self
        return super().place(digest, folder) if mine else self._below.place(digest, folder)

    def read_range(self, digest: str, start: int, stop: int) -> bytes:
        """See `Store.read_range`."""
        if digest in self:
            return super().read_range(digest, start, stop)
        return self._below.read_range(digest, start, stop)
