"""Whether the bytes that a run goes on with are still what they were when they were stored.

While a daemon runs, bytes are hashed as they come and read soon after. A run that is taken up, after a
night or a restart, reads what a disk had to itself meanwhile: the base of its next round, and what
counts already for the round under way. Looking at it once costs reading it once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from orchestrator.ledger import RunRow
from orchestrator.rounds.engine import Engine, Model
from protos.errors import DataCorrupt, NotFound


def check_intact(engine: Engine, run: RunRow) -> None:
    """Read what the next round of a run is made of.

    What is not in the store at all, the round says that needs it.

    Raises:
        DataCorrupt: Some of it is damaged; says what.
        Unavailable: The store can't be reached.
    """
    for what, name in _read(engine, run):
        try:
            with suppress(NotFound):
                engine.store.verify(name)
        except DataCorrupt as error:
            raise DataCorrupt(f"{what} is damaged: {error.message}", **error.facts) from None


def _read(engine: Engine, run: RunRow) -> Iterator[tuple[str, str]]:
    last = engine.ledger.last_committed(run.id)
    if last is not None:
        for place, name in Model.of(last).parts().items():
            yield f"the {place} part of the model of round {last.round}", name
        if last.outer_state:
            yield f"the outer state of round {last.round}", last.outer_state
    for row in engine.ledger.open_rounds():
        if row.run == run.id:
            for c in engine.ledger.contributions(row.run, row.round, row.attempt):
                yield f"what site {c.site} sent for round {row.round}", c.index
