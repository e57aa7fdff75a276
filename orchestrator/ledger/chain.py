"""The hash chain of a run: each entry names the digest of the one before it.

It holds digests and ids only. Bytes and names of sites live outside it, so that they can be erased
without breaking it.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from orchestrator.ledger import tables
from orchestrator.ledger.rows import Entry, EntryKind
from orchestrator.ledger.statement import Statement
from protos.digest import canonical, digest
from protos.errors import DataCorrupt

ENTRIES = tables.entries

_NEWEST = Statement(
    sa.select(ENTRIES.c.number, ENTRIES.c.digest)
    .where(ENTRIES.c.run == sa.bindparam("the_run"))
    .order_by(ENTRIES.c.number.desc())
    .limit(1)
    .with_for_update()
)
_APPEND = Statement(sa.insert(ENTRIES))


def append(
    db: sa.Connection, run: str, kind: EntryKind, time: float, document: dict[str, Any]
) -> Entry:
    """Add an entry, in the transaction of what it tells; gives it."""
    last = _NEWEST.first(db, {"the_run": run})
    number, previous = (last.number + 1, last.digest) if last else (1, "")
    text = canonical(document).decode()
    name = entry_digest(run, number, kind, time, text, previous)
    made = Entry(run, number, kind, time, text, previous, name)
    _APPEND.change(db, {field: getattr(made, field) for field in Entry.__slots__})
    return made


def entries(db: sa.Connection, run: str) -> list[Entry]:
    """All entries of a run, oldest first."""
    query = sa.select(ENTRIES).where(ENTRIES.c.run == run).order_by(ENTRIES.c.number)
    return [Entry(*row) for row in db.execute(query)]


def verify(run: str, chain: list[Entry]) -> str:
    """Check the links; gives the digest of the newest entry.

    Raises:
        DataCorrupt: An entry was changed, removed or put in; says which.
    """
    previous = ""
    for number, entry in enumerate(chain, 1):
        right = entry_digest(run, number, entry.kind, entry.time, entry.document, previous)
        if (entry.number, entry.previous, entry.digest) != (number, previous, right):
            raise DataCorrupt(
                f"ledger of run {run}: entry {number} ({entry.kind}) is not what was written."
                " Compare with a backup.",
                run=run,
                entry=number,
            )
        previous = entry.digest
    return previous


def entry_digest(
    run: str, number: int, kind: str, time: float, document: str, previous: str
) -> str:
    """The digest of an entry, and through ``previous`` of all before it."""
    return digest(canonical([run, number, kind, time, document, previous]))
