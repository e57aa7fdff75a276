"""Plans in the ledger: what each site was asked, and how that ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from orchestrator.ledger import tables
from orchestrator.ledger.database import Database, plain
from orchestrator.ledger.rows import Answer, PlanKind, PlanRow
from orchestrator.ledger.statement import Statement
from protos.digest import digest
from protos.errors import Conflict, InvalidInput, NotFound
from protos.faults import reach

PLANS, EXCHANGES, ROUNDS = tables.plans, tables.exchanges, tables.rounds

PARTS = ("run", "round", "attempt", "kind")


def _same(table: sa.Table, *names: str) -> sa.ColumnElement[bool]:
    return sa.and_(*(table.c[name] == sa.bindparam(f"the_{name}") for name in names))


_ONE = sa.select(PLANS).where(_same(PLANS, *PARTS, "site"))
_FIND, _LOCK = Statement(_ONE), Statement(_ONE.with_for_update())
_ANSWER = Statement(
    sa.update(PLANS)
    .where(_same(PLANS, *PARTS, "site"))
    .values(
        {n: sa.bindparam(n) for n in ("answer", "error", "message", "answered", "contribution")}
    )
)
_OPENED = sa.select(EXCHANGES.c.opened).where(
    _same(EXCHANGES, *PARTS), EXCHANGES.c.closed.is_(None)
)
_OPEN_EXCHANGE, _LOCK_EXCHANGE = Statement(_OPENED), Statement(_OPENED.with_for_update())


class Plans(Database):
    """The part of the ledger that knows what was asked of whom."""

    def plan(self, plan_id: str, site: str) -> PlanRow | None:
        """A site's plan; None if there is none of that id for it."""
        with self._reading() as db:
            return find_plan(db, plan_id, site)

    def plans(self, run: str, round: int, attempt: int) -> list[PlanRow]:
        """All plans of an attempt with their answers, by kind and site."""
        with self._reading() as db:
            return plans_of(db, run, round, attempt)

    def open_plans(self, site: str) -> list[PlanRow]:
        """What a site still has to do: plans of open exchanges without an answer, oldest first."""
        with self._reading() as db:
            return [_plan(row) for row in _OPEN.all(db, {"the_site": site})]

    def add_plans(self, plans: Sequence[PlanRow]) -> None:
        """Add plans to an exchange that is open (a site that joins late).

        Raises:
            Conflict: The exchange is not open, or a site has another plan in it.
        """
        with self._writing() as db:
            for plan in plans:
                if not lock_exchange(db, plan.run, plan.round, plan.attempt, plan.kind):
                    raise Conflict(f"plan {plan.id}: its exchange is not open (any more)")
                put_plan(db, plan, replace=False)

    def answer_plan(
        self, plan_id: str, site: str, answer: Answer, error: str = "", message: str = ""
    ) -> PlanRow:
        """Record how a plan ended other than with a contribution. The first answer stays.

        Gives the row afterwards, so that the caller sees which answer stands.

        Raises:
            NotFound: There is no such plan.
            InvalidInput: ``counted``, which only `accept` may say.
        """
        if answer == "counted":
            raise InvalidInput(f"plan {plan_id}: only a contribution makes it counted")
        with self._writing() as db:
            plan = find_plan(db, plan_id, site, lock=True)
            if plan is None:
                raise no_plan(plan_id, site)
            if not plan.answer:
                set_answer(db, plan, answer, self._clock(), error=error, message=message)
                reach("answer.set")
            return find_plan(db, plan_id, site) or plan


def of_attempt(table: sa.Table, run: str, round: int, attempt: int) -> sa.ColumnElement[bool]:
    """The rows of one attempt."""
    return (table.c.run == run) & (table.c.round == round) & (table.c.attempt == attempt)


def is_plan(plan: PlanRow) -> sa.ColumnElement[bool]:
    """The row of one plan."""
    attempt = of_attempt(PLANS, plan.run, plan.round, plan.attempt)
    return attempt & (PLANS.c.kind == plan.kind) & (PLANS.c.site == plan.site)


def is_open() -> sa.ColumnElement[bool]:
    """Plans whose exchange is open."""
    same = sa.and_(
        *(EXCHANGES.c[key] == PLANS.c[key] for key in ("run", "round", "attempt", "kind"))
    )
    return sa.exists().where(same, EXCHANGES.c.closed.is_(None))


def _in_order(*where: sa.ColumnElement[bool]) -> sa.Select[Any]:
    when = sa.select(ROUNDS.c.started).where(
        of_attempt(ROUNDS, PLANS.c.run, PLANS.c.round, PLANS.c.attempt)  # type: ignore[arg-type]
    )
    order = (when.scalar_subquery(), PLANS.c.round, PLANS.c.attempt, PLANS.c.kind)
    return sa.select(PLANS).where(*where).order_by(*order)


_OF_ATTEMPT = Statement(sa.select(PLANS).where(_same(PLANS, "run", "round", "attempt")))
_OPEN = Statement(_in_order(is_open(), _same(PLANS, "site"), PLANS.c.answer == ""))


def select_plans(db: sa.Connection, *where: sa.ColumnElement[bool]) -> list[PlanRow]:
    """Plans, oldest first."""
    return [_plan(row) for row in db.execute(_in_order(*where))]


def plans_of(db: sa.Connection, run: str, round: int, attempt: int) -> list[PlanRow]:
    """All plans of an attempt, by kind and site."""
    key = {"the_run": run, "the_round": round, "the_attempt": attempt}
    found = [_plan(row) for row in _OF_ATTEMPT.all(db, key)]
    return sorted(found, key=lambda plan: (plan.kind, plan.site))


def find_plan(db: sa.Connection, plan_id: str, site: str, lock: bool = False) -> PlanRow | None:
    """A site's plan by its id; None if there is none."""
    parts = plan_id.split("/")
    if len(parts) != 4 or not (parts[1].isdecimal() and parts[2].isdecimal()):
        return None
    if max(len(parts[1]), len(parts[2])) > 9:
        return None
    key = {
        "the_run": parts[0],
        "the_round": int(parts[1]),
        "the_attempt": int(parts[2]),
        "the_kind": parts[3],
        "the_site": site,
    }
    row = (_LOCK if lock else _FIND).first(db, key)
    return None if row is None else _plan(row)


def no_plan(plan_id: str, site: str) -> NotFound:
    """The error for a plan that is not there."""
    return NotFound(f"site {site} has no plan {plan_id[:256]}", site=site)


def put_plan(db: sa.Connection, plan: PlanRow, replace: bool) -> None:
    """Write a plan. One that asks for the same work stays as it is, with its answer.

    Raises:
        Conflict: The site has another plan there, and it shall not be replaced.
    """
    old = find_plan(db, plan.id, plan.site, lock=True)
    fresh = _unanswered(plan)
    if old is None:
        put_new_plans(db, [plan])
    elif old.work_digest == plan.work_digest:
        return
    elif replace:
        db.execute(sa.update(PLANS).where(is_plan(old)).values(fresh))
    else:
        raise Conflict(f"plan {plan.id}: site {plan.site} was asked for other work under that id")


def put_new_plans(db: sa.Connection, plans: Sequence[PlanRow]) -> None:
    """Write plans of an exchange that has none of these sites yet."""
    if plans:
        rows = [{n: getattr(p, n) for n in (*PARTS, "site")} | _unanswered(p) for p in plans]
        db.execute(sa.insert(PLANS), rows)
        reach("plans.inserted")


def _unanswered(plan: PlanRow) -> dict[str, Any]:
    return {
        "plan": plan.plan,
        "work_digest": plan.work_digest,
        "answer": "",
        "error": "",
        "message": "",
        "answered": None,
        "contribution": None,
    }


def set_answer(
    db: sa.Connection,
    plan: PlanRow,
    answer: Answer,
    now: float,
    *,
    error: str = "",
    message: str = "",
    contribution: str | None = None,
) -> None:
    """Write how a plan ended."""
    _ANSWER.change(
        db,
        {
            **{f"the_{name}": getattr(plan, name) for name in (*PARTS, "site")},
            "answer": answer,
            "error": plain(error)[:200],
            "message": plain(message),
            "answered": now,
            "contribution": contribution,
        },
    )


def in_open_exchange(db: sa.Connection, plan: PlanRow) -> bool:
    """Whether a plan's exchange is open just now."""
    key = {f"the_{name}": getattr(plan, name) for name in PARTS}
    return _OPEN_EXCHANGE.first(db, key) is not None


def lock_exchange(db: sa.Connection, run: str, round: int, attempt: int, kind: PlanKind) -> bool:
    """Whether an exchange is open; if so nobody closes it before this transaction ends."""
    key = {"the_run": run, "the_round": round, "the_attempt": attempt, "the_kind": kind}
    return _LOCK_EXCHANGE.first(db, key) is not None


def plan_digests(plans: Sequence[PlanRow]) -> list[str]:
    """Digests of the plans' bytes, by site: what the hash chain says of them."""
    return [digest(plan.plan) for plan in sorted(plans, key=lambda plan: plan.site)]


def _plan(row: Any) -> PlanRow:
    values = row._asdict()
    return PlanRow(**{**values, "contribution": values["contribution"] or ""})
