"""Runs in the ledger: the queue, and the hash chain of what happened to each of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from orchestrator.ledger import chain, tables
from orchestrator.ledger.database import Database, plain, to_json
from orchestrator.ledger.near import not_found
from orchestrator.ledger.rows import Entry, RunRow
from orchestrator.ledger.statement import Statement
from orchestrator.views import RunState
from protos.errors import Conflict

RUNS, ROUNDS = tables.runs, tables.rounds

_ONE = sa.select(RUNS).where(
    sa.or_(RUNS.c.id == sa.bindparam("the_run"), RUNS.c.name == sa.bindparam("the_run"))
)
_FIND, _LOCK = Statement(_ONE), Statement(_ONE.with_for_update())
_IN_ORDER = sa.select(RUNS).order_by(RUNS.c.created, RUNS.c.id)
_FIRST = Statement(_IN_ORDER.where(RUNS.c.state == sa.bindparam("the_state")).limit(1))


class Runs(Database):
    """The part of the ledger that knows the runs."""

    def _id(self, db: sa.Connection, name_or_id: str) -> str:
        """The id of a run. Looked up once: no run is ever removed, or gets another name.

        Raises:
            NotFound: There is no such run.
        """
        known = self._run_ids.get(name_or_id)
        if known is None:
            known = self._run_ids[name_or_id] = find(db, name_or_id).id
        return known

    def create_run(self, row: RunRow) -> None:
        """Record a new run.

        Raises:
            Conflict: There is a run of that name or id.
            NotFound: The run that it is started from is not there.
        """
        values = {
            "id": row.id,
            "name": row.name,
            "config": to_json(row.config),
            "config_digest": row.config_digest,
            "rounds": row.rounds,
            "created": row.created,
            "state": row.state,
            "reason": plain(row.reason),
            "started": row.started,
            "ended": row.ended,
            "parent_run": row.parent[0] if row.parent else None,
            "parent_round": row.parent[1] if row.parent else None,
            "model": row.model,
            "outer_state": row.outer_state,
        }
        with self._writing() as db:
            # An id that is a name, or the other way round, would make `run` ambiguous.
            taken = sa.or_(RUNS.c.name.in_([row.name, row.id]), RUNS.c.id.in_([row.name, row.id]))
            other = db.execute(sa.select(RUNS.c.name, RUNS.c.state).where(taken)).first()
            if other is not None:
                raise Conflict(
                    f"run {other.name}: there is one of that name ({other.state}). Give the new one"
                    f" another name, or give that one more rounds: `farflung extend {other.name}`.",
                    run=other.name,
                    state=other.state,
                )
            if row.parent:
                find(db, row.parent[0])
            db.execute(sa.insert(RUNS).values(values))
            document: dict[str, Any] = {"config": row.config_digest, "rounds": row.rounds}
            if row.parent:
                document["parent"] = list(row.parent)
            if row.model:
                document["model"] = row.model
            chain.append(db, row.id, "created", row.created, document)

    def runs(self) -> list[RunRow]:
        """All runs, oldest first."""
        with self._reading() as db:
            return [_run(row) for row in db.execute(_IN_ORDER)]

    def run(self, name_or_id: str) -> RunRow:
        """One run, by its id or its name.

        Raises:
            NotFound: There is no such run; the message names near matches.
        """
        with self._reading() as db:
            return find(db, name_or_id)

    def set_run(
        self,
        run: str,
        *,
        state: RunState | None = None,
        reason: str | None = None,
        started: float | None = None,
        ended: float | None = None,
        model: str | None = None,
        expect: Collection[RunState] = (),
    ) -> RunRow:
        """Change a run; None leaves a field as it is. Gives the row afterwards.

        The state ``queued`` or ``running`` forgets ``ended`` (a run that goes on).

        Args:
            run: Its id.
            state: The new state.
            reason: Why.
            started: When its first round began.
            ended: When it ended.
            model: Digest of the index of its first base, before any round is committed.
            expect: States in which alone this may be done; empty for any.

        Raises:
            NotFound: There is no such run.
            Conflict: It is in none of the expected states, or ``model`` comes too late.
        """
        values: dict[str, Any] = {
            "state": state,
            "reason": None if reason is None else plain(reason),
            "started": started,
            "ended": ended,
            "model": model,
        }
        values = {key: value for key, value in values.items() if value is not None}
        if state in ("queued", "running"):
            values["ended"] = None
        with self._writing() as db:
            found = find(db, run, lock=True)
            if expect and found.state not in expect:
                raise Conflict(
                    f"run {found.name}: it is {found.state}, and has to be"
                    f" {' or '.join(sorted(expect))} for this",
                    run=found.name,
                    state=found.state,
                )
            if model is not None and model != found.model:
                committed = (ROUNDS.c.run == found.id) & (ROUNDS.c.state == "committed")
                if db.scalar(sa.select(sa.func.count()).select_from(ROUNDS).where(committed)):
                    raise Conflict(f"run {found.name}: its model comes from its committed rounds")
            if values:
                db.execute(sa.update(RUNS).where(RUNS.c.id == found.id).values(values))
            return find(db, found.id)

    def extend_run(self, run: str, rounds: int) -> RunRow:
        """Give a run more rounds: ``rounds`` in all. Gives the row afterwards.

        Raises:
            NotFound: There is no such run.
            Conflict: It has as many already.
        """
        with self._writing() as db:
            found = find(db, run, lock=True)
            if rounds <= found.rounds:
                raise Conflict(
                    f"run {found.name}: it has {found.rounds} rounds already; ask for more than that",
                    run=found.name,
                    rounds=found.rounds,
                )
            db.execute(sa.update(RUNS).where(RUNS.c.id == found.id).values(rounds=rounds))
            chain.append(db, found.id, "extended", self._clock(), {"rounds": rounds})
            return find(db, found.id)

    def next_queued(self) -> RunRow | None:
        """The oldest run that is queued."""
        return self._first("queued")

    def running(self) -> RunRow | None:
        """The run that is running: after a start, the one to go on with."""
        return self._first("running")

    def entries(self, run: str) -> list[Entry]:
        """The hash chain of a run, oldest first."""
        with self._reading() as db:
            return chain.entries(db, self._id(db, run))

    def verify_entries(self, run: str) -> str:
        """Check a run's hash chain; gives the digest of its newest entry.

        Raises:
            NotFound: There is no such run.
            DataCorrupt: An entry was changed, removed or put in; names it.
        """
        with self._reading() as db:
            found = find(db, run)
            return chain.verify(found.id, chain.entries(db, found.id))

    def _first(self, state: RunState) -> RunRow | None:
        with self._reading() as db:
            row = _FIRST.first(db, {"the_state": state})
            return None if row is None else _run(row)


def find(db: sa.Connection, name_or_id: str, lock: bool = False) -> RunRow:
    """A run, by its id or its name.

    Raises:
        NotFound: There is no such run.
    """
    row = (_LOCK if lock else _FIND).first(db, {"the_run": name_or_id})
    if row is None:
        raise not_found("run", name_or_id, list(db.scalars(sa.select(RUNS.c.name))))
    return _run(row)


def _run(row: Any) -> RunRow:
    values = row._asdict()
    run, number = values.pop("parent_run"), values.pop("parent_round")
    values["config"] = json.loads(values["config"])
    return RunRow(**values, parent=None if run is None else (run, number))
