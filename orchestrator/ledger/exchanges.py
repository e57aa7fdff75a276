"""Exchanges in the ledger: while one is open, answers to its plans count."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from orchestrator.ledger import chain, tables
from orchestrator.ledger.database import Database
from orchestrator.ledger.plans import (
    lock_exchange,
    of_attempt,
    plan_digests,
    put_new_plans,
    put_plan,
)
from orchestrator.ledger.rows import PlanKind, PlanRow
from orchestrator.ledger.statement import Statement
from protos.errors import Conflict, InvalidInput
from protos.faults import reach

EXCHANGES, ROUNDS = tables.exchanges, tables.rounds

_INSERT = Statement(sa.insert(EXCHANGES))
_OF_ATTEMPT = sa.update(EXCHANGES).where(
    *(EXCHANGES.c[name] == sa.bindparam(f"the_{name}") for name in ("run", "round", "attempt"))
)
_OF_KIND = EXCHANGES.c.kind == sa.bindparam("the_kind")
_REOPEN = Statement(_OF_ATTEMPT.where(_OF_KIND).values(closed=None))
_CLOSE = _OF_ATTEMPT.where(EXCHANGES.c.closed.is_(None)).values(closed=sa.bindparam("now"))
_END_ALL, _END = Statement(_CLOSE), Statement(_CLOSE.where(_OF_KIND))


class Exchanges(Database):
    """The part of the ledger that knows which answers still count.

    An exchange is (run, round, attempt, kind). Planning a round opens the one of its plans (train
    or init); closing, holding, committing and abandoning it close whatever is open.
    """

    def open_exchange(
        self, run: str, round: int, attempt: int, kind: PlanKind, plans: Sequence[PlanRow] = ()
    ) -> None:
        """Open the exchange of a closed round in which its candidate is assessed.

        It may have been opened before, by a daemon that was stopped then: plans that ask for the
        same work keep their answers, plans that ask for other work replace the old ones.

        Raises:
            Conflict: The round attempt is not closed.
            InvalidInput: A plan is of another exchange.
        """
        _belong(plans, run, round, attempt, kind)
        with self._writing() as db:
            query = sa.select(ROUNDS.c.state).where(of_attempt(ROUNDS, run, round, attempt))
            state = db.scalar(query.with_for_update())
            if state != "closed":
                raise Conflict(
                    f"run {run}, round {round}, attempt {attempt}: it is {state or 'not there'},"
                    f" and has to be closed before {kind} begins"
                )
            begin(db, run, round, attempt, kind, plans, self._clock())
            document = {
                "round": round,
                "attempt": attempt,
                "kind": kind,
                "plans": plan_digests(plans),
            }
            chain.append(db, run, "opened", self._clock(), document)
            reach("exchange.opened")

    def close_exchange(self, run: str, round: int, attempt: int, kind: PlanKind) -> None:
        """Close an exchange: answers to its plans are late from now on. Twice is as once."""
        with self._writing() as db:
            end(db, run, round, attempt, self._clock(), kind)

    def exchange_open(self, run: str, round: int, attempt: int, kind: PlanKind) -> bool:
        """Whether contributions to this exchange still count."""
        with self._reading() as db:
            query = sa.select(EXCHANGES.c.opened).where(
                of_attempt(EXCHANGES, run, round, attempt),
                EXCHANGES.c.kind == kind,
                EXCHANGES.c.closed.is_(None),
            )
            return db.execute(query).first() is not None


def begin(
    db: sa.Connection,
    run: str,
    round: int,
    attempt: int,
    kind: PlanKind,
    plans: Sequence[PlanRow],
    now: float,
) -> None:
    """Open an exchange, again if need be, and write its plans."""
    if not lock_exchange(db, run, round, attempt, kind):
        known = {"the_run": run, "the_round": round, "the_attempt": attempt, "the_kind": kind}
        if not _REOPEN.change(db, known):
            key = {"run": run, "round": round, "attempt": attempt, "kind": kind}
            _INSERT.change(db, {**key, "opened": now, "closed": None})
            put_new_plans(db, plans)
            reach("exchange.begun")
            return
    for plan in plans:
        put_plan(db, plan, replace=True)
    reach("exchange.begun.again")


def end(
    db: sa.Connection,
    run: str,
    round: int,
    attempt: int,
    now: float,
    kind: PlanKind | None = None,
) -> None:
    """Close one exchange of an attempt, or all that are open."""
    key = {"the_run": run, "the_round": round, "the_attempt": attempt, "now": now}
    if kind is None:
        _END_ALL.change(db, key)
    else:
        _END.change(db, {**key, "the_kind": kind})
    reach("exchange.ended")


def _belong(plans: Sequence[PlanRow], run: str, round: int, attempt: int, kind: PlanKind) -> None:
    for plan in plans:
        if (plan.run, plan.round, plan.attempt, plan.kind) != (run, round, attempt, kind):
            raise InvalidInput(f"plan {plan.id} is not one of {run}/{round}/{attempt}/{kind}")
