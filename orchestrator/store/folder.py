"""Blobs as files of a folder: write, sync, rename, sync the folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from orchestrator.store.blobs import Blob, Look
from protos.chunks import sync_folder, write_durably
from protos.digest import Bytes
from protos.faults import reach
from protos.spares import Spares


class Folder:
    """Blobs in a folder; see `Blobs`.

    Args:
        root: It must be there.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        for name in ("artefacts", "manifests", "objects", "tombstones"):
            (root / name).mkdir(exist_ok=True)

    def get(self, key: str) -> bytes:
        """See `Blobs.get`."""
        return (self._root / key).read_bytes()

    def put(self, key: str, data: Bytes) -> None:
        """See `Blobs.put`."""
        path = self._made(key)
        if path.exists():
            os.utime(path)
        else:
            write_durably(path, data)

    def put_file(self, key: str, file: Path) -> None:
        """See `Blobs.put_file`. The file must be on the same file system."""
        with file.open("rb") as opened:
            os.fdatasync(opened.fileno())  # costs nothing if it was synced before, as it should be
            reach("blob.synced")
        file.rename(self._made(key))  # `put` syncs the folder
        reach("blob.renamed")

    def find(self, key: str) -> Blob | None:
        """See `Blobs.find`."""
        try:
            stat = (self._root / key).stat()
        except FileNotFoundError:
            return None
        return Blob(key, stat.st_size, stat.st_mtime)

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """See `Blobs.read_range`."""
        parts = []
        with (self._root / key).open("rb", buffering=0) as file:
            while start < stop and (part := os.pread(file.fileno(), stop - start, start)):
                parts.append(part)  # one read gives at most 2 GiB
                start += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def remove(self, keys: Sequence[str]) -> None:
        """See `Blobs.remove`."""
        changed: dict[Path, None] = {}
        for key in keys:
            path = self._root / key
            if path.exists():
                path.unlink()
                reach("blob.unlinked")
                changed[path.parent] = None
        for folder in changed:
            sync_folder(folder)
            reach("blob.removed")

    def recycle(self, key: str, spares: Spares) -> None:
        """See `Blobs.recycle`."""
        spares.give(self._root / key)

    def list(self, prefix: str) -> Iterator[Blob]:
        """See `Blobs.list`."""
        for path in (self._root / prefix).rglob("[!.]*"):
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if path.is_file():
                yield Blob(path.relative_to(self._root).as_posix(), stat.st_size, stat.st_mtime)

    def file(self, key: str, index: Look) -> Path:
        """See `Blobs.file`."""
        return self._root / key

    def here(self, key: str) -> Path | None:
        """See `Blobs.here`."""
        path = self._root / key
        return path if path.exists() else None

    def lend(self, key: str, index: Look, folder: Path) -> Path:
        """See `Blobs.lend`."""
        return self._root / key

    def place(self, key: str, index: Look, folder: Path) -> str:
        """See `Blobs.place`."""
        return str(self._root / key)

    def clean(self) -> int:
        """See `Blobs.clean`."""
        freed = 0
        for path in self._root.glob("*/**/.*.new"):  # of write_durably
            freed += path.lstat().st_size
            path.unlink()
        return freed

    def spare(self) -> int:
        """See `Blobs.spare`."""
        return 0

    def _made(self, key: str) -> Path:
        path = self._root / key
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            reach("blob.folder.made")
            sync_folder(path.parent.parent)
        return path
