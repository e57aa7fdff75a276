"""The store that a configuration names."""

from __future__ import annotations

from pathlib import Path

from orchestrator.config import DaemonConfig
from orchestrator.store.store import Store


def open_store(config: DaemonConfig, folder: Path, federation: str) -> Store:
    """Open it for the one daemon that writes it.

    Args:
        config: Its ``[store]``; and whether reducers reach the network: only those of a cluster do.
        folder: The store itself, or what a bucket needs beside it.
        federation: Whose it is.

    Raises:
        ConfigInvalid: The bucket is not there, or the credentials do not do.
        Conflict: It is another federation's.
        Unavailable: It can't be reached.
    """
    if not config.store.url:
        return Store(folder)
    # Here, since a store in a folder needs none of it.
    from orchestrator.store.bucket import Bucket

    bucket = Bucket(config.store, folder, direct=bool(config.ray.address))
    bucket.claim(federation)
    return Store(folder, bucket)
