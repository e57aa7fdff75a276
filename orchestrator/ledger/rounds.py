"""Rounds in the ledger: planned → closed → [held] → committed | abandoned."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import sqlalchemy as sa

from orchestrator.ledger import chain, tables
from orchestrator.ledger.database import plain, to_json
from orchestrator.ledger.exchanges import Exchanges, begin, end
from orchestrator.ledger.plans import of_attempt, plan_digests, plans_of
from orchestrator.ledger.rows import Entry, PlanRow, RoundRow
from orchestrator.ledger.runs import Runs, find
from orchestrator.ledger.signatures import Signatures
from orchestrator.ledger.statement import Statement
from orchestrator.views import RoundState
from protos.digest import digest
from protos.errors import Conflict, InvalidInput, NotFound
from protos.faults import reach

ROUNDS, RUNS = tables.rounds, tables.runs

CLOSED_IN = ("train", "init")
"""Kinds of contributions that a round is made of; there is one of them in an attempt."""

UNDER_WAY: tuple[RoundState, ...] = ("planned", "closed", "held")

_AS_JSON = ("draft", "closed_set", "memos", "summary")

_IN_ORDER = sa.select(ROUNDS).order_by(ROUNDS.c.run, ROUNDS.c.round, ROUNDS.c.attempt)
_NUMBERED = Statement(
    _IN_ORDER.where(
        ROUNDS.c.run == sa.bindparam("the_run"), ROUNDS.c.round == sa.bindparam("the_round")
    )
)
_COMMITTED = Statement(
    _IN_ORDER.where(
        ROUNDS.c.run == sa.bindparam("the_run"),
        ROUNDS.c.state == "committed",
        ROUNDS.c.round > sa.bindparam("the_round"),
    )
)
_NEWEST = Statement(
    sa.select(ROUNDS)
    .where(ROUNDS.c.run == sa.bindparam("the_run"), ROUNDS.c.state == "committed")
    .order_by(ROUNDS.c.round.desc())
    .limit(sa.bindparam("the_count"))
)
_IN_THE_WAY = Statement(
    _IN_ORDER.where(
        ROUNDS.c.run == sa.bindparam("the_run"),
        sa.or_(*(ROUNDS.c.state == state for state in UNDER_WAY))
        | ((ROUNDS.c.state == "committed") & (ROUNDS.c.round >= sa.bindparam("the_round")))
        | (
            (ROUNDS.c.round == sa.bindparam("the_round"))
            & (ROUNDS.c.attempt >= sa.bindparam("the_attempt"))
        ),
    )
)
_INSERT = Statement(sa.insert(ROUNDS))
_CONFIG = Statement(sa.select(RUNS.c.config_digest).where(RUNS.c.id == sa.bindparam("the_run")))
_NOW_AT = Statement(
    sa.update(RUNS)
    .where(RUNS.c.id == sa.bindparam("the_run"))
    .values(model=sa.bindparam("model"), outer_state=sa.bindparam("outer_state"))
)


class Rounds(Runs, Exchanges, Signatures):
    """The part of the ledger that knows runs, their rounds, and the attempts at these."""

    def plan_round(
        self, row: RoundRow, plans: Sequence[PlanRow] = (), *, abandoning: str = ""
    ) -> None:
        """Record an attempt of a round with its plans, before any of them goes out.

        Args:
            row: The attempt, in the state ``planned``.
            plans: Its plans; their exchange is open afterwards.
            abandoning: If given, the round's earlier attempt that is still planned, closed or
                held is abandoned with this reason in the same transaction. An answer then never
                falls between two attempts, where it would be late.

        Raises:
            Conflict: This attempt is there, another one of the run is under way, or this round
                or a later one is committed.
            InvalidInput: The attempt is not in the state ``planned``, or a plan is not one of it.
            NotFound: There is no such run.
        """
        if row.state != "planned":
            raise InvalidInput(f"{_where(row)}: it is {row.state}, not planned")
        for plan in plans:
            if (plan.run, plan.round, plan.attempt) != (row.run, row.round, row.attempt):
                raise InvalidInput(f"plan {plan.id} is not one of {_where(row)}")
        now = self._clock()
        with self._writing() as db:
            run = find(db, row.run, lock=True)
            if abandoning:
                for old in select_rounds(db, ROUNDS.c.run == run.id, ROUNDS.c.state.in_(UNDER_WAY)):
                    if old.round == row.round:
                        step(db, old, UNDER_WAY, "abandoned", now, reason=abandoning)
            _check_free(db, row)
            values = {name: getattr(row, name) for name in RoundRow.__slots__}
            for name in _AS_JSON:
                values[name] = to_json(values[name])
            _INSERT.change(db, {**values, "reason": plain(row.reason)})
            reach("round.inserted")
            for kind in sorted({plan.kind for plan in plans}):
                mine = [plan for plan in plans if plan.kind == kind]
                begin(db, row.run, row.round, row.attempt, kind, mine, now)
            document = {
                "round": row.round,
                "attempt": row.attempt,
                "base": row.base,
                "draft": digest(values["draft"].encode()),
                "plans": plan_digests(plans),
            }
            chain.append(db, row.run, "planned", now, document)
            reach("round.chained")

    def extend_deadline(self, run: str, round: int, attempt: int, by_s: float) -> RoundRow:
        """Put a planned round's deadline off: time with the daemon down does not count.

        Raises:
            Conflict: The attempt is not planned.
        """
        with self._writing() as db:
            which = of_attempt(ROUNDS, run, round, attempt) & (ROUNDS.c.state == "planned")
            longer = {"deadline_s": ROUNDS.c.deadline_s + by_s}
            if not db.execute(sa.update(ROUNDS).where(which).values(longer)).rowcount:
                raise _wrong_state(_row(db, run, round, attempt), ("planned",), "put off")
            return _row(db, run, round, attempt)

    def close_round(
        self,
        run: str,
        round: int,
        attempt: int,
        closed_set: Sequence[str] | None,
        reason: str,
    ) -> RoundRow:
        """Close a planned round: from here on nothing more counts. Gives the row afterwards.

        Args:
            run: Id of the run.
            round: Of the round.
            attempt: Of the attempt.
            closed_set: Digests of counted contributions to close in; None for all that count at
                this instant (nothing that was answered ``counted`` is then left out by a race).
            reason: Why now.

        Raises:
            Conflict: It is not planned, or something in ``closed_set`` does not count for it.
        """
        now = self._clock()
        with self._writing() as db:
            row = _row(db, run, round, attempt)
            end(db, run, round, attempt, now)  # first: from here on the counted ones are fixed
            plans = plans_of(db, run, round, attempt)
            counted = [p.contribution for p in plans if p.kind in CLOSED_IN and p.contribution]
            chosen = counted if closed_set is None else [c for c in counted if c in closed_set]
            if closed_set is not None and set(chosen) != set(closed_set):
                other = min(set(closed_set) - set(chosen))
                raise Conflict(f"{_where(row)}: contribution {other[:12]} does not count for it")
            return _move(db, row, ("planned",), "closed", now, reason=reason, closed_set=chosen)

    def hold_round(
        self,
        run: str,
        round: int,
        attempt: int,
        reason: str,
        *,
        model: str = "",
        outer_state: str = "",
        memos: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
    ) -> RoundRow:
        """Hold a closed round until somebody releases or rejects it; keeps the candidate.

        Raises:
            Conflict: It is not closed.
        """
        with self._writing() as db:
            row = _row(db, run, round, attempt)
            result: dict[str, Any] = {
                "model": model,
                "outer_state": outer_state,
                "memos": memos or {},
                "summary": summary or {},
            }
            return step(db, row, ("closed",), "held", self._clock(), reason=reason, **result)

    def abandon_round(self, run: str, round: int, attempt: int, reason: str) -> RoundRow:
        """Give an attempt up, planned, closed or held.

        Raises:
            Conflict: It is committed, or abandoned.
        """
        with self._writing() as db:
            row = _row(db, run, round, attempt)
            return step(db, row, UNDER_WAY, "abandoned", self._clock(), reason=reason)

    def commit_round(
        self,
        run: str,
        round: int,
        attempt: int,
        *,
        model: str,
        outer_state: str | None = None,
        memos: dict[str, Any] | None = None,
        summary: dict[str, Any] | None = None,
    ) -> RoundRow:
        """Commit a closed or held round, and make its model the run's. Gives the row afterwards.

        Its entry is signed, if somebody signs here (`sign_with`). Before this the round does not
        exist, afterwards it does. None keeps what was held.

        Raises:
            Conflict: It is neither closed nor held.
        """
        with self._writing() as db:
            row = _row(db, run, round, attempt)
            outer = row.outer_state if outer_state is None else outer_state
            result = {
                "model": model,
                "outer_state": outer,
                "memos": row.memos if memos is None else memos,
                "summary": row.summary if summary is None else summary,
            }
            now = self._clock()
            done = step(db, row, ("closed", "held"), "committed", now, self._sign, **result)
            _NOW_AT.change(db, {"the_run": run, "model": model, "outer_state": outer})
            return done

    def rounds(self, run: str, all_attempts: bool = False) -> list[RoundRow]:
        """The rounds of a run in order: of each the last attempt, or all of them."""
        with self._reading() as db:
            rows = select_rounds(db, ROUNDS.c.run == self._id(db, run))
        return rows if all_attempts else list({row.round: row for row in rows}.values())

    def round(self, run: str, number: int, attempt: int | None = None) -> RoundRow:
        """One round: an attempt, or the last one.

        Raises:
            NotFound: There is no such run, round or attempt.
        """
        with self._reading() as db:
            return _row(db, self._id(db, run), number, attempt)

    def history(self, run: str, after: int = -1) -> list[RoundRow]:
        """The committed rounds of a run in order, those after a number."""
        with self._reading() as db:
            key = {"the_run": self._id(db, run), "the_round": after}
            return [_round(row) for row in _COMMITTED.all(db, key)]

    def last_committed(self, run: str) -> RoundRow | None:
        """The newest committed round."""
        found = self.newest(run, 1)
        return found[0] if found else None

    def newest(self, run: str, count: int) -> list[RoundRow]:
        """The newest committed rounds, at most so many, newest first."""
        with self._reading() as db:
            key = {"the_run": self._id(db, run), "the_count": count}
            return [_round(row) for row in _NEWEST.all(db, key)]

    def attempts(self, run: str, number: int) -> list[RoundRow]:
        """The attempts of one round in order; none if it was not planned yet."""
        with self._reading() as db:
            return _numbered(db, self._id(db, run), number)

    def open_rounds(self) -> list[RoundRow]:
        """Attempts of all runs that are planned, closed or held: what a start goes on with."""
        with self._reading() as db:
            return select_rounds(db, ROUNDS.c.state.in_(UNDER_WAY))


def select_rounds(db: sa.Connection, *where: sa.ColumnElement[bool]) -> list[RoundRow]:
    """Attempts by run, round and attempt."""
    return [_round(row) for row in db.execute(_IN_ORDER.where(*where))]


def _numbered(db: sa.Connection, run: str, number: int) -> list[RoundRow]:
    """The attempts of one round."""
    return [_round(row) for row in _NUMBERED.all(db, {"the_run": run, "the_round": number})]


def _row(db: sa.Connection, run: str, number: int, attempt: int | None) -> RoundRow:
    found = [r for r in _numbered(db, run, number) if attempt in (None, r.attempt)]
    if not found:
        which = f"round {number}" + (f", attempt {attempt}" if attempt is not None else "")
        raise NotFound(f"run {run}: there is no {which}", run=run, round=number)
    return found[-1]


def _round(row: Any) -> RoundRow:
    return RoundRow(**_decoded(row._asdict()))


def _decoded(values: dict[str, Any]) -> dict[str, Any]:
    """Columns as fields."""
    out = {name: json.loads(v) if name in _AS_JSON else v for name, v in values.items()}
    if "closed_set" in out:
        out["closed_set"] = tuple(out["closed_set"])
    return out


def _check_free(db: sa.Connection, row: RoundRow) -> None:
    """Whether an attempt may begin, with what there is of its run."""
    key = {"the_run": row.run, "the_round": row.round, "the_attempt": row.attempt}
    for other in map(_round, _IN_THE_WAY.all(db, key)):
        if other.state in UNDER_WAY:
            raise Conflict(f"{_where(other)}: it is {other.state}; end it before planning another")
        if other.state == "committed" and other.round >= row.round:
            raise Conflict(f"{_where(other)}: it is committed, and what is committed stays")
        if other.round == row.round and other.attempt >= row.attempt:
            raise Conflict(f"{_where(row)}: there was attempt {other.attempt} before")


def step(
    db: sa.Connection,
    row: RoundRow,
    before: Sequence[RoundState],
    after: Literal["closed", "held", "committed", "abandoned"],
    now: float,
    sign: Callable[[sa.Connection, Entry], None] | None = None,
    **values: Any,
) -> RoundRow:
    """Move an attempt on, if it is where it should be; whatever is open closes. Gives the new row."""
    end(db, row.run, row.round, row.attempt, now)
    return _move(db, row, before, after, now, sign, **values)


def _move(
    db: sa.Connection,
    row: RoundRow,
    before: Sequence[RoundState],
    after: Literal["closed", "held", "committed", "abandoned"],
    now: float,
    sign: Callable[[sa.Connection, Entry], None] | None = None,
    **values: Any,
) -> RoundRow:
    document: dict[str, Any] = {"round": row.round, "attempt": row.attempt}
    values["state"] = after
    for name, value in list(values.items()):
        if name in _AS_JSON:
            values[name] = to_json(value)
        if name == "reason":
            values[name] = plain(value)
        elif name in ("memos", "summary"):
            document[name] = digest(values[name].encode())
        elif name != "state":
            document[name] = value
    if after == "committed":
        document |= {"closed_set": list(row.closed_set), "base": row.base}
        document["config"] = _CONFIG.first(db, {"the_run": row.run}).config_digest
    if after != "held":
        values["closed" if after == "closed" else "ended"] = now
    key = {"the_run": row.run, "the_round": row.round, "the_attempt": row.attempt}
    if not _stepping(tuple(before), tuple(sorted(values))).change(db, {**key, **values}):
        raise _wrong_state(row, before, after)
    entry = chain.append(db, row.run, after, now, document)
    if sign is not None:
        sign(db, entry)
    reach("round.stepped")
    return replace(row, **_decoded(values))


@cache
def _stepping(before: tuple[RoundState, ...], names: tuple[str, ...]) -> Statement:
    """Gives these columns of an attempt new values if it is in one of these states."""
    key = ("run", "round", "attempt")
    which = sa.and_(*(ROUNDS.c[name] == sa.bindparam(f"the_{name}") for name in key))
    return Statement(
        sa.update(ROUNDS)
        .where(which, sa.or_(*(ROUNDS.c.state == state for state in before)))
        .values({name: sa.bindparam(name) for name in names})
    )


def _wrong_state(row: RoundRow, before: Sequence[RoundState], after: str) -> Conflict:
    return Conflict(
        f"{_where(row)}: it is {row.state}, and has to be {' or '.join(before)} to be {after}",
        run=row.run,
        round=row.round,
        attempt=row.attempt,
        state=row.state,
    )


def _where(row: RoundRow) -> str:
    return f"run {row.run}, round {row.round}, attempt {row.attempt}"
