"""Models so small that they go out with the plans, and come back on the same stream.

A call of Bulk would cost more than their bytes.
"""

from __future__ import annotations

from orchestrator.store import Store
from protos.v1 import site_pb2

SMALL_BYTES = 64 << 10
"""A stream's window: such a message does not hold up what is said after it."""


def small_model(store: Store, digest: str) -> site_pb2.SmallModel | None:
    """A model of the store with its manifest as one message; None if it is not small.

    Args:
        store: Where it is.
        digest: Of its index.
    """
    index = store.index(digest)
    if index.nbytes > SMALL_BYTES:
        return None
    manifest = store.manifest(index.manifest).encoded
    if len(manifest) > SMALL_BYTES:
        return None
    return site_pb2.SmallModel(
        head=site_pb2.ArtefactHead(index=index.encoded, manifest=manifest),
        data=store.read_range(digest, 0, index.nbytes),
    )
