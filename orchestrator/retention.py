"""What is kept, what goes after a commit and what ``gc`` removes, by the daemon's ``[retention]``."""

from __future__ import annotations

from orchestrator.config import RetentionSection
from orchestrator.ledger import RoundRow, RunRow
from orchestrator.rounds.engine import Engine, Model
from orchestrator.run_config import RunConfig
from orchestrator.viewing import best_round
from orchestrator.views import Collected


def collect(engine: Engine, dry_run: bool) -> Collected:
    """Remove from the store what no run needs any more."""
    keep: set[str] = set()
    for run in engine.ledger.runs():
        keep |= needed(engine, run, engine.config.retention)
    return engine.store.collect(keep, dry_run)


def retire(engine: Engine, run: RunRow, committed: int) -> None:
    """Collect, after a commit, the contributions that are not to be kept any longer.

    Their files are what the next round's contributions are written over.

    Args:
        engine: The daemon's parts.
        run: The run.
        committed: The round.
    """
    count = engine.config.retention.contributions
    if count != "all" and committed >= count:
        ended = engine.ledger.round(run.id, committed).ended
        artefacts = engine.ledger.only_of_round(run.id, committed - count)
        engine.store.retire(artefacts, before=ended or 0.0)


def needed(engine: Engine, run: RunRow, retention: RetentionSection) -> set[str]:
    """Digests that a run needs: newest and best always, the last n as the configuration says."""
    ledger = engine.ledger
    history = ledger.history(run.id)
    keep = {RunConfig.from_resolved(run.config).init.digest}
    count = len(history) if retention.models == "all" else retention.models
    kept: list[RoundRow] = [*history[:1], *history[-1:], *(history[-count:] if count else [])]
    best = best_round([r for r in history if r.round > 0])
    kept += [best] if best else []
    for row in kept:
        keep |= set(Model.of(row).parts().values())
        keep |= {f["object"] for f in row.summary.get("files", {}).values()}
    if run.parent is not None and not history:  # it has not begun: its first base is there still
        keep |= set(Model.of(ledger.round(*run.parent)).parts().values())
    if history:
        keep.add(history[-1].outer_state)
        keep |= {s["object"] for s in history[-1].summary.get("payloads", {}).values()}
    count = len(history) if retention.contributions == "all" else retention.contributions
    recent = history[-count:] if count else []
    for row in recent:
        keep |= {c.index for c in ledger.contributions(run.id, row.round, row.attempt)}
    for row in ledger.open_rounds():
        if row.run == run.id:
            keep |= {row.base, row.model, row.outer_state}
    last = history[-1].round if history else -1
    for row in ledger.rounds(run.id, all_attempts=True):
        if row.round > last and row.state != "superseded":
            # Finished work that a later attempt may count.
            keep |= {c.index for c in ledger.contributions(run.id, row.round, row.attempt)}
    return keep - {""}
