"""Rollbacks in the ledger: committed rounds that are no history of anything any more (docs/adr/0023)."""

from __future__ import annotations

import sqlalchemy as sa

from orchestrator.ledger import chain, tables
from orchestrator.ledger.database import plain
from orchestrator.ledger.plans import of_attempt
from orchestrator.ledger.rounds import UNDER_WAY, Rounds, select_rounds, step
from orchestrator.ledger.rows import RoundRow
from orchestrator.ledger.runs import find
from protos.errors import Conflict

ROUNDS, RUNS = tables.rounds, tables.runs


class Rollbacks(Rounds):
    """The part of the ledger that takes rounds back."""

    def roll_back(self, run: str, round: int, reason: str) -> RoundRow:
        """Make a committed round the newest again, and queue its run. Gives the round's row.

        Those after it become ``superseded``: they stay in the ledger and are no history of any base,
        so that what comes next is planned as if they had not been; so do those that were held and
        rejected, whose numbers would not be used again otherwise. What is under way is abandoned.

        Raises:
            NotFound: There is no such run.
            Conflict: The run is queued or running, the round is not committed, there is none
                after it, or another run started from one of those.
        """
        now = self._clock()
        with self._writing() as db:
            found = find(db, run, lock=True)
            if found.state in ("queued", "running"):
                raise Conflict(
                    f"run {found.name}: it is {found.state}. Stop it first:"
                    f" `farflung stop {found.name}`.",
                    run=found.name,
                    state=found.state,
                )
            committed = select_rounds(db, ROUNDS.c.run == found.id, ROUNDS.c.state == "committed")
            target = next((row for row in committed if row.round == round), None)
            if target is None:
                raise Conflict(f"run {found.name}: round {round} is not committed", run=found.name)
            for row in select_rounds(db, ROUNDS.c.run == found.id, ROUNDS.c.state.in_(UNDER_WAY)):
                step(db, row, UNDER_WAY, "abandoned", now, reason=reason)
            later = [row for row in committed if row.round > round]
            child = sa.select(RUNS.c.name).where(
                RUNS.c.parent_run == found.id, RUNS.c.parent_round > round
            )
            if (name := db.scalar(child)) is not None:
                raise Conflict(
                    f"run {found.name}: run {name} started from a later round, which can't be taken"
                    f" back. Start another run from this one instead: `farflung launch RUN.TOML"
                    f" --from {found.name}@{round}`.",
                    run=found.name,
                )
            if not later:
                raise Conflict(f"run {found.name}: round {round} is the newest", run=found.name)
            later += _held(db, found.id, round)
            for row in later:
                db.execute(
                    sa.update(ROUNDS)
                    .where(of_attempt(ROUNDS, found.id, row.round, row.attempt))
                    .values(state="superseded", reason=plain(reason))
                )
            result = {"model": target.model, "outer_state": target.outer_state}
            again = {"state": "queued", "reason": "", "ended": None}
            db.execute(sa.update(RUNS).where(RUNS.c.id == found.id).values({**result, **again}))
            superseded = sorted([row.round, row.attempt] for row in later)
            document = {"round": round, "superseded": superseded, "reason": reason, **result}
            chain.append(db, found.id, "rolled_back", now, document)
            return target


def _held(db: sa.Connection, run: str, after: int) -> list[RoundRow]:
    """Attempts behind a round that were held and then given up: their numbers are free again, too."""
    rows = select_rounds(
        db, ROUNDS.c.run == run, ROUNDS.c.round > after, ROUNDS.c.state == "abandoned"
    )
    return [row for row in rows if row.model]
