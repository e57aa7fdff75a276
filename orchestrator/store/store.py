"""The store: content-addressed bytes in a folder, or in a bucket with a folder beside it.

    artefacts/ab/<digest>.index    the index, canonical JSON; its digest is the artefact's name
    artefacts/ab/<digest>.data     the bytes
    manifests/<digest>.json        manifests, canonical JSON
    objects/<digest>               small documents
    tombstones/<digest>            what was erased: when and why

The folder has in any case

    scratch/                       unfinished files, on the same file system
    spare/                         files that the next contributions are written over
    lock                           one process at a time puts an index, erases or collects

A name appears only with complete, durable bytes behind it: an artefact's index comes after its data.
Only the daemon and its gateways change the store; reducers read.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

from orchestrator.store.blobs import Blobs
from orchestrator.store.collection import collect
from orchestrator.store.folder import Folder
from orchestrator.store.space import Reservation, Space, room
from orchestrator.store.tombstones import Tombstones
from orchestrator.turns import FileLock
from orchestrator.views import Collected
from protos.digest import Bytes, is_digest
from protos.digest import digest as digest_of
from protos.errors import DataCorrupt, InvalidInput, NotFound
from protos.faults import reach
from protos.manifest import CHUNK_BYTES, Index, Manifest
from protos.spares import Spares

SPARES = 256
"""Files in ``spare``: about what the sites of one round contribute."""

VERIFY_CHUNKS = 16
"""Chunks that `Store.verify` reads at once."""

_decoded = lru_cache(maxsize=2)(Manifest.decode)
"""The newest: every step of a round asks for the same."""


class Store:
    """A store in a folder, which is made if it is not there.

    Digests that are not in it raise `NotFound` (with the fact ``erased`` and the reason, if they
    were), bytes that do not have their digest `DataCorrupt`.

    Args:
        root: The folder.
        blobs: Where the bytes lie; in the folder, if not given.

    Attributes:
        blobs: As given.
    """

    def __init__(self, root: Path, blobs: Blobs | None = None) -> None:
        self.root = root.absolute()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.root / "scratch").mkdir(exist_ok=True)
        self.blobs: Blobs = blobs or Folder(self.root)
        self._tombstones = Tombstones(self.blobs)
        self.spares = Spares(self.root / "spare", SPARES)
        self._space = Space(self.root, lambda: self.spares.clear() + self.blobs.spare())
        self._lock = FileLock(self.root / "lock")  # daemon and gateways: adopt, erase, collect
        self._numbers = itertools.count(1)

    # --------------------------------------------------------------------------- manifests

    def put_manifest(self, manifest: Manifest) -> str:
        """Store a manifest; gives its digest."""
        self._put(_manifest_key(manifest.digest), manifest.digest, manifest.encoded)
        return manifest.digest

    def manifest(self, digest: str) -> Manifest:
        """A manifest."""
        return _decoded(self._get(_manifest_key(digest), digest, "manifest"))

    # --------------------------------------------------------------------------- artefacts

    def adopt(self, index: Index, data: Path) -> str:
        """Move a complete file, on this file system, into the store; gives the artefact's digest.

        Its chunks were checked when they came; here only its size is. If the artefact is there
        already, the file is removed. Something that had been erased is no longer so.

        Raises:
            DataCorrupt: The file has not the size of the index.
            OutOfSpace: The disk is full.
        """
        size = data.stat().st_size
        if size != index.nbytes:
            raise DataCorrupt(
                f"{data}: {size} bytes where the index of artefact {index.digest[:12]} says"
                f" {index.nbytes}",
                artefact=index.digest,
            )
        name = index.digest
        with self._lock, room(self.root):
            reach("adopt.begun")
            if name in self:
                # collect() must see that it is wanted again
                self.blobs.put(_index_key(name), index.encoded)
                reach("adopt.renewed")
                if data.absolute() != self.root / _data_key(name):
                    data.unlink()
                return name
        with room(self.root):
            self.blobs.put_file(_data_key(name), data)  # may take long: nobody waits for it
            reach("adopt.moved")
        with self._lock, room(self.root):
            found = self.blobs.find(_data_key(name))
            if found is None or found.nbytes != size:
                raise NotFound(f"artefact {name[:12]} was erased while it came", digest=name)
            self.blobs.put(_index_key(name), index.encoded)
            reach("adopt.indexed")
            self._tombstones.lift(name)
        return name

    def put_file(self, data: Path, manifest_digest: str) -> Index:
        """Hash a file, sync it and adopt it."""
        with data.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            starts = range(0, size, CHUNK_BYTES)
            chunks = tuple(digest_of(os.pread(file.fileno(), CHUNK_BYTES, at)) for at in starts)
        index = Index(manifest_digest, size, chunks)
        self.adopt(index, data)
        return index

    def index(self, digest: str) -> Index:
        """The index of an artefact."""
        return Index.decode(self._get(_index_key(digest), digest, "artefact"))

    def path(self, digest: str) -> Path:
        """A file with an artefact's bytes, to be read only and soon."""
        return self.blobs.file(self._held(digest), lambda: self.index(digest))

    def here(self, digest: str) -> Path | None:
        """The file of this machine that has an artefact's bytes, if there is one already."""
        return self.blobs.here(_data_key(digest))

    def lend(self, digest: str, folder: Path) -> Path:
        """A file with an artefact's bytes, to be read only, for whoever works in ``folder``."""
        return self.blobs.lend(self._held(digest), lambda: self.index(digest), folder)

    def place(self, digest: str, folder: Path) -> str:
        """Where whoever works in ``folder`` reads ranges of an artefact: `places.open_place`."""
        return self.blobs.place(self._held(digest), lambda: self.index(digest), folder)

    def __contains__(self, digest: object) -> bool:
        """Whether an artefact of that digest is here."""
        if not isinstance(digest, str) or not is_digest(digest):
            return False
        return (
            self.blobs.find(_index_key(digest)) is not None
            and self.blobs.find(_data_key(digest)) is not None
            and self._tombstones.reason(digest) is None
        )

    def _held(self, digest: str) -> str:
        if digest not in self:
            raise self._missing(digest, "artefact")
        return _data_key(digest)

    def read_range(self, digest: str, start: int, stop: int) -> bytes:
        """Bytes of an artefact, from ``start`` to before ``stop``.

        Raises:
            InvalidInput: The range is not within the artefact.
            DataCorrupt: There are fewer than its index says.
        """
        index = self.index(digest)
        if not 0 <= start <= stop <= index.nbytes:
            raise InvalidInput(
                f"artefact {digest[:12]} has {index.nbytes} bytes, {start} to {stop} are not"
                " within it"
            )
        data = self._read(digest, start, stop)
        if len(data) < stop - start:
            raise _damaged(digest, (start + len(data)) // CHUNK_BYTES)
        return data

    def verify(self, digest: str) -> None:
        """Read an artefact and check every chunk.

        Raises:
            DataCorrupt: A chunk is damaged or missing; the fact ``chunk`` is its number.
        """
        index = self.index(digest)
        for first in range(0, len(index.chunks), VERIFY_CHUNKS):
            expected = index.chunks[first : first + VERIFY_CHUNKS]
            start = first * CHUNK_BYTES
            stop = index.span(first + len(expected) - 1)[1]
            view = memoryview(self._read(digest, start, stop))
            for number, name in enumerate(expected):
                if digest_of(view[number * CHUNK_BYTES :][:CHUNK_BYTES]) != name:
                    raise _damaged(digest, first + number)
        found = self.blobs.find(_data_key(digest))
        if found is None or found.nbytes != index.nbytes:
            raise _damaged(digest, len(index.chunks))

    def _read(self, digest: str, start: int, stop: int) -> bytes:
        try:
            return self.blobs.read_range(_data_key(digest), start, stop)
        except FileNotFoundError:
            raise self._missing(digest, "artefact") from None

    # --------------------------------------------------------------------- small documents

    def put_bytes(self, data: Bytes) -> str:
        """Store a small document; gives its digest."""
        name = digest_of(data)
        self._put(_object_key(name), name, data)
        return name

    def get_bytes(self, digest: str) -> bytes:
        """A small document, checked."""
        return self._get(_object_key(digest), digest, "document")

    # ---------------------------------------------------------------------- unfinished work

    def scratch(self, name: str) -> Path:
        """A new path for an unfinished file; ``name`` is part of it, and every call gives another."""
        number = next(self._numbers)
        safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)[:100]
        return self.root / "scratch" / f"{safe}.{os.getpid()}.{number}.{os.urandom(4).hex()}"

    def clean(self) -> int:
        """Remove what unfinished work left behind; for the daemon's start. Gives the bytes freed."""
        freed = 0
        with self._lock:
            for path in (self.root / "scratch").iterdir():
                freed += _size(path)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            freed += self.blobs.clean()
            reach("store.cleaned")
            erased = self._tombstones.digests()
            if erased:  # perhaps one that was cut off
                prefixes = ("artefacts", "manifests", "objects")
                blobs = [b for prefix in prefixes for b in self.blobs.list(prefix)]
                left = [blob for blob in blobs if blob.digest in erased]
                self.blobs.remove([blob.key for blob in left])
                freed += sum(blob.nbytes for blob in left)
        return freed

    def reserve(self, nbytes: int) -> AbstractContextManager[Reservation]:
        """Set room on the disk aside while the block runs.

        Raises:
            OutOfSpace: There is less, with what others set aside taken off; the facts say how much.
        """
        return self._space.reserve(nbytes)

    # ------------------------------------------------------------------------------ the end

    def erase(self, digest: str, reason: str) -> None:
        """Remove an artefact or a document for good and remember why. Twice is as once."""
        _check(digest)
        with self._lock:
            here = any(self.blobs.find(key) is not None for key in _keys(digest))
            if not here and self.erased(digest) is None:
                raise self._missing(digest, "artefact or document")
            # The tombstone first: a reader in between hears "erased", never "not found".
            self._tombstones.put(digest, reason)
            self.blobs.remove(_keys(digest))
            self.spares.clear()  # what was collected before must be gone for good now, too

    def retire(self, digests: Iterable[str], before: float) -> None:
        """Collect artefacts that nobody will ask for by name again; their files become spares.

        Twice is as once. They leave no tombstones: there are as many as sites in every round.

        Args:
            digests: Of artefacts.
            before: One that was stored later, or again, stays: its row may not be in the ledger yet.
        """
        with self._lock:
            going = [
                digest for digest in digests if digest in self and self._since(digest) < before
            ]
            self.blobs.remove([_index_key(digest) for digest in going])  # no artefacts from here on
            reach("retire.unnamed")
            for digest in going:
                self.blobs.recycle(_data_key(digest), self.spares)
                reach("retire.recycled")
            self.blobs.remove([_data_key(digest) for digest in going])
            reach("retire.removed")

    def _since(self, digest: str) -> float:
        index = self.blobs.find(_index_key(digest))
        return index.modified if index is not None else math.inf

    def erased(self, digest: str) -> str | None:
        """Why it was erased; None if it was not."""
        return self._tombstones.reason(digest) if is_digest(digest) else None

    def collect(self, keep: set[str], dry_run: bool, grace_s: float = 3600.0) -> Collected:
        """Remove what nobody needs: artefacts, documents and manifests that are not in ``keep``.

        The manifests of kept artefacts are kept, and everything that was stored within the last
        ``grace_s`` seconds (its row may not be in the ledger yet). What goes leaves a tombstone.
        """
        with self._lock:
            return collect(self, keep, dry_run, grace_s)

    # ---------------------------------------------------------------------------- underneath

    def _put(self, key: str, digest: str, data: Bytes) -> None:
        with self._lock, room(self.root):
            self.blobs.put(key, data)
            reach("store.put")
            self._tombstones.lift(digest)

    def _get(self, key: str, digest: str, what: str) -> bytes:
        if self._tombstones.reason(digest) is not None:
            raise self._missing(digest, what)
        try:
            data = self.blobs.get(key)
        except FileNotFoundError:
            raise self._missing(digest, what) from None
        if digest_of(data) != digest:
            raise DataCorrupt(
                f"{key}: its bytes do not have the digest that it is named by. Restore it from a"
                " copy, or go back to an earlier round.",
                artefact=digest,
            )
        return data

    def _missing(self, digest: str, what: str) -> NotFound:
        reason = self.erased(digest)
        if reason is not None:
            return NotFound(
                f"{what} {digest[:12]} was erased: {reason}",
                digest=digest,
                erased=True,
                reason=reason,
            )
        return NotFound(f"{what} {digest[:12]} is not in the store", digest=digest)


def _index_key(digest: str) -> str:
    _check(digest)
    return f"artefacts/{digest[:2]}/{digest}.index"


def _data_key(digest: str) -> str:
    _check(digest)
    return f"artefacts/{digest[:2]}/{digest}.data"


def _manifest_key(digest: str) -> str:
    _check(digest)
    return f"manifests/{digest}.json"


def _object_key(digest: str) -> str:
    _check(digest)
    return f"objects/{digest}"


def _keys(digest: str) -> tuple[str, ...]:
    """All that may stand for a digest, the index last: an erasure that was cut off can go on."""
    return (_data_key(digest), _object_key(digest), _manifest_key(digest), _index_key(digest))


def _check(digest: str) -> None:
    if not is_digest(digest):
        raise NotFound(f"{digest[:80]!r} is not a digest")


def _damaged(digest: str, chunk: int) -> DataCorrupt:
    return DataCorrupt(
        f"artefact {digest[:12]}: chunk {chunk} is damaged or missing. Restore its file from a"
        " copy, or go back to an earlier round.",
        artefact=digest,
        chunk=chunk,
    )


def _size(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(_size(child) for child in path.iterdir())
    return path.lstat().st_size
