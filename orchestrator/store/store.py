"""The store: content-addressed files in one folder; S3 comes later behind the same methods.

    artefacts/ab/<digest>.index    the index, canonical JSON; its digest is the artefact's name
    artefacts/ab/<digest>.data     the bytes
    manifests/<digest>.json        manifests, canonical JSON
    objects/<digest>               small documents
    tombstones/<digest>            what was erased: when and why
    scratch/                       unfinished files, on the same file system

A name appears only with complete, durable bytes behind it: write, sync, rename, sync the folder.
Only the daemon changes the store; reducers open the same folder and read.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from orchestrator.store.space import Reservation
from orchestrator.views import Collected
from protos.digest import Bytes
from protos.manifest import Index, Manifest


class Store:
    """A store in a folder, which is made if it is not there.

    Digests that are not in it raise `NotFound` (with the fact ``erased`` and the reason, if they
    were), bytes that do not have their digest `DataCorrupt`.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        raise NotImplementedError

    def put_manifest(self, manifest: Manifest) -> str:
        """Store a manifest; gives its digest."""
        raise NotImplementedError

    def manifest(self, digest: str) -> Manifest:
        """A manifest."""
        raise NotImplementedError

    def adopt(self, index: Index, data: Path) -> str:
        """Move a complete file, on this file system, into the store; gives the artefact's digest.

        Its chunks were checked when they came; here only its size is. If the artefact is there
        already, the file is removed. Something that had been erased is no longer so.

        Raises:
            DataCorrupt: The file has not the size of the index.
            OutOfSpace: The disk is full.
        """
        raise NotImplementedError

    def put_file(self, data: Path, manifest_digest: str) -> Index:
        """Hash a file, sync it and adopt it."""
        raise NotImplementedError

    def index(self, digest: str) -> Index:
        """The index of an artefact."""
        raise NotImplementedError

    def path(self, digest: str) -> Path:
        """The file of an artefact, to be read only."""
        raise NotImplementedError

    def __contains__(self, digest: object) -> bool:
        """Whether an artefact of that digest is here."""
        raise NotImplementedError

    def read_range(self, digest: str, start: int, stop: int) -> bytes:
        """Bytes of an artefact, from ``start`` to before ``stop``.

        Raises:
            InvalidInput: The range is not within the artefact.
            DataCorrupt: The file is shorter than its index says.
        """
        raise NotImplementedError

    def put_bytes(self, data: Bytes) -> str:
        """Store a small document; gives its digest."""
        raise NotImplementedError

    def get_bytes(self, digest: str) -> bytes:
        """A small document, checked."""
        raise NotImplementedError

    def verify(self, digest: str) -> None:
        """Read an artefact and check every chunk.

        Raises:
            DataCorrupt: A chunk is damaged or missing; the fact ``chunk`` is its number.
        """
        raise NotImplementedError

    def scratch(self, name: str) -> Path:
        """A new path for an unfinished file; ``name`` is part of it, and every call gives another."""
        raise NotImplementedError

    def clean(self) -> int:
        """Remove what unfinished work left behind; for the daemon's start. Gives the bytes freed."""
        raise NotImplementedError

    def reserve(self, nbytes: int) -> AbstractContextManager[Reservation]:
        """Set room on the disk aside while the block runs.

        Raises:
            OutOfSpace: There is less, with what others set aside taken off; the facts say how much.
        """
        raise NotImplementedError

    def erase(self, digest: str, reason: str) -> None:
        """Remove an artefact or a document for good and remember why. Twice is as once."""
        raise NotImplementedError

    def erased(self, digest: str) -> str | None:
        """Why it was erased; None if it was not."""
        raise NotImplementedError

    def collect(self, keep: set[str], dry_run: bool, grace_s: float = 3600.0) -> Collected:
        """Remove what nobody needs: artefacts, documents and manifests that are not in ``keep``.

        The manifests of kept artefacts are kept, and everything that was stored within the last
        ``grace_s`` seconds (its row may not be in the ledger yet). What goes leaves a tombstone.
        """
        raise NotImplementedError
