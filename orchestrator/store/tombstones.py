"""Tombstones: that something was erased, when and why, so that nobody takes it for damage."""

from __future__ import annotations

import json
import time

from orchestrator.store.blobs import Blobs
from protos.digest import canonical

TOMBSTONES = "tombstones"


class Tombstones:
    """One small blob per erased digest.

    Args:
        blobs: Where.
    """

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def reason(self, digest: str) -> str | None:
        """Why it was erased; None if it was not."""
        try:
            return str(json.loads(self._blobs.get(_key(digest)))["reason"])
        except FileNotFoundError:
            return None

    def put(self, digest: str, reason: str) -> None:
        """Remember an erasure; the first reason stays."""
        if self.reason(digest) is None:
            self._blobs.put(_key(digest), canonical({"reason": reason, "time": time.time()}))

    def lift(self, digest: str) -> None:
        """Forget it: the bytes are back."""
        if self._blobs.find(_key(digest)) is not None:
            self._blobs.remove([_key(digest)])

    def digests(self) -> set[str]:
        """All that was erased."""
        return {blob.digest for blob in self._blobs.list(TOMBSTONES)} - {""}


def _key(digest: str) -> str:
    return f"{TOMBSTONES}/{digest}"
