"""Collecting what nobody needs any more."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from orchestrator.store.blobs import Blob
from orchestrator.views import Collected
from protos.errors import DataCorrupt, NotFound

if TYPE_CHECKING:
    from orchestrator.store.store import Store

COLLECTED = "collected: nothing refers to it"


def collect(store: Store, keep: set[str], dry_run: bool, grace_s: float) -> Collected:
    """See `Store.collect`, which holds the lock."""
    youngest = time.time() - grace_s
    files = [blob for blob in store.blobs.list("artefacts") if blob.digest]
    artefacts = {blob.digest: blob for blob in files if blob.key.endswith(".index")}
    kept = {name for name, blob in artefacts.items() if _stays(blob, keep, youngest)}
    needed = keep | {_manifest_of(store, name) for name in kept}
    documents = [*store.blobs.list("manifests"), *store.blobs.list("objects")]
    others = {blob.digest: blob for blob in documents if blob.digest}
    also = {name for name, blob in others.items() if _stays(blob, needed, youngest)}

    going = (artefacts.keys() - kept) | (others.keys() - also)
    # Data whose index never came is of no use to anybody.
    orphans = [b for b in files if b.digest not in artefacts and b.modified < youngest]
    waste = [blob for blob in (*files, *others.values()) if blob.digest in going] + orphans
    if not dry_run:
        for name in sorted(going):
            store.erase(name, COLLECTED)
        store.blobs.remove([blob.key for blob in orphans])
    return Collected(
        dry_run=dry_run,
        files=len(waste),
        bytes=sum(blob.nbytes for blob in waste),
        kept=len(kept) + len(also),
        names=tuple(sorted(going)),
    )


def _stays(blob: Blob, keep: set[str], youngest: float) -> bool:
    return blob.digest in keep or blob.modified >= youngest


def _manifest_of(store: Store, name: str) -> str:
    try:
        return store.index(name).manifest
    except (DataCorrupt, NotFound):
        return ""  # a damaged index is for verify() to report; it can't name a manifest
