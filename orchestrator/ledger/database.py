"""The database under the ledger: opening it, migrating it, one writer, errors in our own words."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Self


class Database:
    """An open database; `open` makes one."""

    @classmethod
    def open(cls, where: str | Path, clock: Callable[[], float] = time.time) -> Self:
        """Open a ledger, make it if there is none, and bring it to this version.

        Args:
            where: A file, or the URL of a database (``postgresql://…``).
            clock: Gives the seconds since the epoch.

        Raises:
            Conflict: A newer Farflung wrote it.
            DataCorrupt: It is damaged, or not a database.
            Unavailable: Another process holds it, or the database server can't be reached.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close it; the object can't be used any more."""
        raise NotImplementedError

    def get_meta(self, key: str) -> str | None:
        """What was stored under a key; None if nothing was."""
        raise NotImplementedError

    def set_meta(self, key: str, value: str) -> None:
        """Store some text under a key."""
        raise NotImplementedError
