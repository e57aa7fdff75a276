"""Collecting what nobody needs any more."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.views import Collected
from protos.digest import is_digest
from protos.errors import FarflungError

if TYPE_CHECKING:
    from orchestrator.store.store import Store

COLLECTED = "collected: nothing refers to it"


def collect(store: Store, keep: set[str], dry_run: bool, grace_s: float) -> Collected:
    """See `Store.collect`, which holds the lock."""
    youngest = time.time() - grace_s
    artefacts = _found(store.root / "artefacts", "*/*.index")
    kept = {name: path for name, path in artefacts.items() if _stays(name, path, keep, youngest)}
    needed = keep | {_manifest_of(store, name) for name in kept}
    others = _found(store.root / "manifests", "*.json") | _found(store.root / "objects", "*")
    also = {name for name, path in others.items() if _stays(name, path, needed, youngest)}

    going = sorted((artefacts.keys() - kept.keys()) | (others.keys() - also))
    # Data whose index never came is of no use to anybody.
    orphans = [
        path
        for name, path in _found(store.root / "artefacts", "*/*.data").items()
        if name not in artefacts and path.stat().st_mtime < youngest
    ]
    files = [path for name in going for path in store._paths(name) if path.exists()] + orphans
    nbytes = sum(path.stat().st_size for path in files)
    if not dry_run:
        for name in going:
            store.erase(name, COLLECTED)
        for path in orphans:
            path.unlink()
    return Collected(
        dry_run=dry_run,
        files=len(files),
        bytes=nbytes,
        kept=len(kept) + len(also),
        names=tuple(going),
    )


def _found(folder: Path, pattern: str) -> dict[str, Path]:
    return {path.stem: path for path in folder.glob(pattern) if is_digest(path.stem)}


def _stays(name: str, path: Path, keep: set[str], youngest: float) -> bool:
    return name in keep or path.stat().st_mtime >= youngest


def _manifest_of(store: Store, name: str) -> str:
    try:
        return store.index(name).manifest
    except FarflungError:
        return ""  # a damaged index is for verify() to report; it can't name a manifest
