"""The store: content-addressed files in one folder; S3 comes later behind the same methods.

    artefacts/ab/<digest>.index    the index, canonical JSON; its digest is the artefact's name
    artefacts/ab/<digest>.data     the bytes
    manifests/<digest>.json        manifests, canonical JSON
    objects/<digest>               small documents
    tombstones/<digest>            what was erased: when and why
    scratch/                       unfinished files, on the same file system
    spare/                         files that the next contributions are written over

A name appears only with complete, durable bytes behind it: write, sync, rename, sync the folder.
Only the daemon changes the store; reducers open the same folder and read.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from orchestrator.store.collection import COLLECTED, collect
from orchestrator.store.space import Reservation, Space
from orchestrator.store.tombstones import Tombstones
from orchestrator.views import Collected
from protos.chunks import sync_folder, write_durably
from protos.digest import Bytes, is_digest
from protos.digest import digest as digest_of
from protos.errors import DataCorrupt, InvalidInput, NotFound, OutOfSpace
from protos.manifest import CHUNK_BYTES, Index, Manifest
from protos.spares import Spares

SPARES = 256
"""Files in ``spare``: about what the sites of one round contribute."""

FOLDERS = ("artefacts", "manifests", "objects", "tombstones", "scratch")


class Store:
    """A store in a folder, which is made if it is not there.

    Digests that are not in it raise `NotFound` (with the fact ``erased`` and the reason, if they
    were), bytes that do not have their digest `DataCorrupt`.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in FOLDERS:
            (self.root / name).mkdir(exist_ok=True)
        self._tombstones = Tombstones(self.root / "tombstones")
        self.spares = Spares(self.root / "spare", SPARES)
        self._space = Space(self.root, self.spares)
        self._lock = threading.RLock()  # among the daemon's threads: adopt, erase, collect
        self._scratches = 0

    # --------------------------------------------------------------------------- manifests

    def put_manifest(self, manifest: Manifest) -> str:
        """Store a manifest; gives its digest."""
        self._put(self._manifest_path(manifest.digest), manifest.encoded)
        return manifest.digest

    def manifest(self, digest: str) -> Manifest:
        """A manifest."""
        return Manifest.decode(self._get(self._manifest_path(digest), digest, "manifest"))

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
        name, at = index.digest, self._data_path(index.digest)
        with self._lock, _room(self.root):
            if name in self:
                os.utime(self._index_path(name))  # collect() must see that it is wanted again
                if data.absolute() != at:
                    data.unlink()
                return name
            with data.open("rb") as file:
                os.fsync(file.fileno())  # costs nothing if it was synced before, as it should be
            if not at.parent.exists():
                at.parent.mkdir(exist_ok=True)
                sync_folder(at.parent.parent)
            # The index first: data under its name is then never without one.
            write_durably(self._index_path(name), index.encoded)
            data.rename(at)
            sync_folder(at.parent)
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
        return Index.decode(self._get(self._index_path(digest), digest, "artefact"))

    def path(self, digest: str) -> Path:
        """The file of an artefact, to be read only."""
        if digest not in self:
            raise self._missing(digest, "artefact")
        return self._data_path(digest)

    def __contains__(self, digest: object) -> bool:
        """Whether an artefact of that digest is here."""
        if not isinstance(digest, str) or not is_digest(digest):
            return False
        return (
            self._data_path(digest).exists()
            and self._index_path(digest).exists()
            and self._tombstones.reason(digest) is None
        )

    def read_range(self, digest: str, start: int, stop: int) -> bytes:
        """Bytes of an artefact, from ``start`` to before ``stop``.

        Raises:
            InvalidInput: The range is not within the artefact.
            DataCorrupt: The file is shorter than its index says.
        """
        try:
            fd = os.open(self._data_path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self._missing(digest, "artefact") from None
        parts = []
        try:
            size = os.fstat(fd).st_size
            if start < 0 or stop < start or stop > size:
                self._bad_range(digest, start, stop, size)
            while start < stop:  # one read gives at most 2 GiB
                part = os.pread(fd, stop - start, start)
                if not part:
                    self._bad_range(digest, start, stop, start)
                parts.append(part)
                start += len(part)
        finally:
            os.close(fd)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def verify(self, digest: str) -> None:
        """Read an artefact and check every chunk.

        Raises:
            DataCorrupt: A chunk is damaged or missing; the fact ``chunk`` is its number.
        """
        index = self.index(digest)
        with self.path(digest).open("rb", buffering=0) as file:
            for number, expected in enumerate(index.chunks):
                start, stop = index.span(number)
                if digest_of(os.pread(file.fileno(), stop - start, start)) != expected:
                    raise _damaged(digest, number)
            if os.fstat(file.fileno()).st_size != index.nbytes:
                raise _damaged(digest, len(index.chunks))

    # --------------------------------------------------------------------- small documents

    def put_bytes(self, data: Bytes) -> str:
        """Store a small document; gives its digest."""
        name = digest_of(data)
        self._put(self._object_path(name), data)
        return name

    def get_bytes(self, digest: str) -> bytes:
        """A small document, checked."""
        return self._get(self._object_path(digest), digest, "document")

    # ---------------------------------------------------------------------- unfinished work

    def scratch(self, name: str) -> Path:
        """A new path for an unfinished file; ``name`` is part of it, and every call gives another."""
        with self._lock:
            self._scratches += 1
            number = self._scratches
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
            for path in self.root.glob("*/**/.*.new"):  # of write_durably
                freed += _size(path)
                path.unlink()
            for digest in self._tombstones.digests():  # an erasure that was cut off
                freed += self._remove(digest)
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
            here = any(path.exists() for path in self._paths(digest))
            if not here and self.erased(digest) is None:
                raise self._missing(digest, "artefact or document")
            # The tombstone first: a reader in between hears "erased", never "not found".
            self._tombstones.put(digest, reason)
            self._remove(digest)
            self.spares.clear()  # what was collected before must be gone for good now, too

    def retire(self, digest: str) -> None:
        """Collect one artefact; its file becomes a spare. Twice is as once."""
        with self._lock:
            if digest in self:
                self._tombstones.put(digest, COLLECTED)
                self.spares.give(self._data_path(digest))
                self._remove(digest)

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

    def _index_path(self, digest: str) -> Path:
        _check(digest)
        return self.root / "artefacts" / digest[:2] / f"{digest}.index"

    def _data_path(self, digest: str) -> Path:
        return self._index_path(digest).with_suffix(".data")

    def _manifest_path(self, digest: str) -> Path:
        _check(digest)
        return self.root / "manifests" / f"{digest}.json"

    def _object_path(self, digest: str) -> Path:
        _check(digest)
        return self.root / "objects" / digest

    def _paths(self, digest: str) -> tuple[Path, ...]:
        """Every file that may stand for a digest, the index last: `_remove` can then go on."""
        return (
            self._data_path(digest),
            self._object_path(digest),
            self._manifest_path(digest),
            self._index_path(digest),
        )

    def _remove(self, digest: str) -> int:
        freed = 0
        for path in self._paths(digest):
            if path.exists():
                freed += path.stat().st_size
                path.unlink()
                sync_folder(path.parent)
        return freed

    def _put(self, path: Path, data: Bytes) -> None:
        with self._lock, _room(self.root):
            if path.exists():
                os.utime(path)
            else:
                write_durably(path, data)
            self._tombstones.lift(path.stem)

    def _get(self, path: Path, digest: str, what: str) -> bytes:
        if self._tombstones.reason(digest) is not None:
            raise self._missing(digest, what)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise self._missing(digest, what) from None
        if digest_of(data) != digest:
            raise DataCorrupt(
                f"{path}: its bytes do not have the digest that it is named by. Restore it from a"
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

    def _bad_range(self, digest: str, start: int, stop: int, size: int) -> None:
        index = self.index(digest)
        if 0 <= start <= stop <= index.nbytes:
            raise _damaged(digest, size // CHUNK_BYTES)
        raise InvalidInput(
            f"artefact {digest[:12]} has {index.nbytes} bytes, {start} to {stop} are not within it"
        )


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


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Turns a full disk into an error of ours."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise OutOfSpace(
            f"{folder}: the disk is full ({free} bytes are free). Make room (`farflung gc`), or move"
            " the store to a larger disk.",
            free=free,
            folder=str(folder),
        ) from error
