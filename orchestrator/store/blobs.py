"""Where the store's bytes lie: named blobs, of which there is all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from protos.digest import Bytes, is_digest
from protos.manifest import Index
from protos.spares import Spares

Look = Callable[[], Index]
"""Looks up what bytes should be, for whoever has to fetch them."""


class Blob(NamedTuple):
    """One that is there.

    Attributes:
        key: Its name, a relative path with "/".
        nbytes: Its size.
        modified: When it was put the last time, seconds since 1970.
    """

    key: str
    nbytes: int
    modified: float

    @property
    def digest(self) -> str:
        """The digest in its name; empty if there is none."""
        stem = self.key.rsplit("/", 1)[-1].split(".", 1)[0]
        return stem if is_digest(stem) else ""


class Blobs(Protocol):
    """Blobs in a folder or in a bucket. What is not there raises `FileNotFoundError`.

    A blob appears complete and durable, and does not change: its name is a digest. One daemon
    writes.
    """

    def get(self, key: str) -> bytes:
        """All bytes of a small one."""
        ...

    def put(self, key: str, data: Bytes) -> None:
        """Write a small one; if it is there, only its time becomes now."""
        ...

    def put_file(self, key: str, file: Path) -> None:
        """Move a large one here; the file is gone afterwards. Durable once one beside it is put."""
        ...

    def find(self, key: str) -> Blob | None:
        """Its size and age; None if it is not there."""
        ...

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """Bytes from ``start`` to before ``stop``, fewer where it ends before."""
        ...

    def remove(self, keys: Sequence[str]) -> None:
        """Remove those that are there, in this order."""
        ...

    def recycle(self, key: str, spares: Spares) -> None:
        """Give the file behind one that is going to the spares, if there is a file here."""
        ...

    def list(self, prefix: str) -> Iterator[Blob]:
        """All whose key begins with a folder."""
        ...

    def file(self, key: str, index: Look) -> Path:
        """A file of this machine with all its bytes, to be read only and soon."""
        ...

    def here(self, key: str) -> Path | None:
        """The file of this machine that has its bytes, if there is one already."""
        ...

    def lend(self, key: str, index: Look, folder: Path) -> Path:
        """The same, there as long as ``folder`` (on the store's file system) is."""
        ...

    def place(self, key: str, index: Look, folder: Path) -> str:
        """The location for `arithmetic.places.open_place`, good as long as ``folder`` is there."""
        ...

    def clean(self) -> int:
        """Remove what unfinished work left; gives the bytes freed."""
        ...

    def spare(self) -> int:
        """Make room on this machine's disk with what can be had again; gives the bytes freed."""
        ...
