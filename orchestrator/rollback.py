"""Going back: a run goes on from an earlier round's model, and what came after stays on record."""

from __future__ import annotations

from orchestrator.ledger import RoundRow, RunRow
from orchestrator.rounds.engine import Engine, Model
from protos.errors import NotFound


def roll_back(engine: Engine, name: str, round: int) -> RunRow:
    """Make a committed round a run's newest, and queue the run. Gives its row afterwards.

    Raises:
        NotFound: There is no such run, or something that its next round needs was erased.
        Conflict: See `Ledger.roll_back`.
    """
    ledger = engine.ledger
    run = ledger.run(name)
    for row in ledger.history(run.id):
        if row.round == round:
            _check_there(engine, run, row)
    ledger.roll_back(run.id, round, f"rolled back to round {round}")
    engine.note("warning", run.id, None, "", f"run {run.name} was rolled back to round {round}")
    return ledger.run(run.id)


def _check_there(engine: Engine, run: RunRow, row: RoundRow) -> None:
    """What the round after this one reads."""
    store, summary = engine.store, row.summary
    for name in {*Model.of(row).parts().values(), row.outer_state} - {""}:
        try:
            store.index(name)
        except NotFound as error:
            raise NotFound(
                f"run {run.name}: round {row.round} can't be gone back to: {error.message}",
                run=run.name,
                round=row.round,
            ) from None
    for kind in ("files", "payloads"):
        for spec in summary.get(kind, {}).values():
            store.get_bytes(spec["object"])
