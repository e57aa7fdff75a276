"""The index of bytes that are not in a file."""

from __future__ import annotations

from collections.abc import Iterable

from protos.digest import Bytes, digest
from protos.manifest import CHUNK_BYTES, Index


def index_of(parts: Iterable[Bytes], manifest_digest: str) -> Index:
    """The index that a file of these bytes would have."""
    chunks: list[str] = []
    pending, nbytes = bytearray(), 0
    for part in parts:
        view = memoryview(part).cast("B")
        nbytes += len(view)
        while view:
            take = CHUNK_BYTES - len(pending)
            pending += view[:take]
            view = view[take:]
            if len(pending) == CHUNK_BYTES:
                chunks.append(digest(pending))
                pending = bytearray()
    if pending:
        chunks.append(digest(pending))
    return Index(manifest_digest, nbytes, tuple(chunks))
