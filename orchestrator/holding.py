"""Held rounds: what becomes of them, by the run file or by an operator's word.

A held round keeps its candidate and its closed set, so that neither decision trains anything again:
released, it is committed as it is; rejected, it is abandoned, and the run goes on with the next
round from the last good model.
"""

from __future__ import annotations

from orchestrator.ledger import Ledger, RoundRow, RunRow
from orchestrator.run_config import RunConfig
from protos.errors import Conflict

MOST_IN_A_ROW = 3
"""So many held rounds, one after the other, are for a person to look at."""


def held_round(ledger: Ledger, run: str) -> RoundRow | None:
    """The round of a run that is held; None if none is."""
    found = (row for row in ledger.open_rounds() if row.run == run and row.state == "held")
    return next(found, None)


def release(ledger: Ledger, held: RoundRow) -> RoundRow:
    """Commit a held round as it is."""
    return ledger.commit_round(held.run, held.round, held.attempt, model=held.model)


def reject(ledger: Ledger, held: RoundRow) -> RoundRow:
    """Abandon a held round for good."""
    reason = f"rejected: {held.reason}"
    return ledger.abandon_round(held.run, held.round, held.attempt, reason)


def settle(ledger: Ledger, run: RunRow, held: RoundRow) -> str:
    """Decide as the run file says; gives why a person has to instead, empty if it is decided."""
    choice = RunConfig.from_resolved(run.config).gate.on_hold
    count = in_a_row(ledger, run.id)
    if choice != "wait" and count < MOST_IN_A_ROW:
        (release if choice == "release" else reject)(ledger, held)
        return ""
    many = f" ({count} rounds in a row were held)" if count >= MOST_IN_A_ROW else ""
    return (
        f"waiting for decision{many}: round {held.round} is held, {held.reason}. "
        f"`farflung release {run.name}` or `farflung reject {run.name}`"
    )


def in_a_row(ledger: Ledger, run: str) -> int:
    """How many of the newest rounds were held, one after the other."""
    count = 0
    for row in reversed(ledger.rounds(run)):
        if row.state == "superseded":
            continue  # the run was rolled back behind it
        if not was_held(row):
            break
        count += 1
    return count


def after_rejected(ledger: Ledger, run: str) -> int:
    """The number behind the newest round that was rejected; 0 if none was."""
    done = [r.round for r in ledger.rounds(run) if r.state == "abandoned" and was_held(r)]
    return max(done, default=-1) + 1


def was_held(row: RoundRow) -> bool:
    """Whether an attempt was held, whatever became of it."""
    return bool(row.summary.get("held"))


def for_decision(ledger: Ledger, run: RunRow) -> RoundRow:
    """The round that an operator is to decide on.

    Raises:
        Conflict: The run does not wait for a decision.
    """
    held = held_round(ledger, run.id)
    if held is None or run.state != "paused":
        raise Conflict(
            f"run {run.name}: it is {run.state}, and no round of it waits for a decision",
            run=run.name,
            state=run.state,
        )
    return held
