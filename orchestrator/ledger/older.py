"""Work for an earlier round that counts in a later one, where the run file allows it (``[cohort] stale``).

A plan says from which bases (``accepts``), and is in the ledger before it goes out. Such a contribution
counts in place of the site's own for that round, and its row is kept with the round in which it counts.
"""

from __future__ import annotations

import sqlalchemy as sa

from orchestrator.ledger import tables
from orchestrator.ledger.plans import find_plan, is_open, lock_exchange, select_plans
from orchestrator.ledger.rows import ContributionRow, PlanRow
from orchestrator.ledger.runs import find
from protos.contribution import Header
from protos.errors import NotYet
from protos.plan import Plan, round_of

CONTRIBUTIONS, PLANS, ROUNDS = tables.contributions, tables.plans, tables.rounds


def later_plan(db: sa.Connection, plan: PlanRow, base: str, lock: bool) -> PlanRow | None:
    """The open plan of a later round that work of a closed one counts for.

    Args:
        db: The transaction.
        plan: The closed one.
        base: From which the work was done.
        lock: Have it stay open until the transaction ends.

    Raises:
        NotYet: There is none now, and the next round will accept it.
    """
    stale = allowed(db, plan)
    if not stale or plan.answer not in ("", "failed") or counted_for(db, plan) is not None:
        return None
    for other in select_plans(db, _of_site(plan), PLANS.c.round > plan.round, is_open()):
        if other.answer not in ("", "failed") or not Plan.decode(other.plan).takes(base):
            continue
        if not lock:
            return other
        if lock_exchange(db, other.run, other.round, other.attempt, other.kind):
            return find_plan(db, other.id, other.site, lock=True)
    if _next_accepts(db, plan, base, stale):
        raise NotYet(
            f"site {plan.site}: round {plan.round} is closed; its work counts in the next round,"
            " which is not open yet",
            site=plan.site,
            round=plan.round,
        )
    return None


def counted_for(db: sa.Connection, plan: PlanRow) -> PlanRow | None:
    """The plan of a later round, the newest attempt, for which a contribution to a plan counts."""
    digest = (
        sa.select(CONTRIBUTIONS.c.digest)
        .where(CONTRIBUTIONS.c.run == plan.run, CONTRIBUTIONS.c.round > plan.round)
        .where(CONTRIBUTIONS.c.kind == plan.kind, CONTRIBUTIONS.c.site == plan.site)
        .where(CONTRIBUTIONS.c.plan_id == plan.id, CONTRIBUTIONS.c.verdict == "counted")
    )
    found = select_plans(db, _of_site(plan), PLANS.c.contribution.in_(digest))
    return found[-1] if found else None


def carried(
    db: sa.Connection, plan: PlanRow, taken_back: sa.Select[tuple[str]]
) -> ContributionRow | None:
    """The newest such contribution that counted for another attempt of the plan's round."""
    if not allowed(db, plan):
        return None
    accepts = Plan.decode(plan.plan)
    query = (
        sa.select(CONTRIBUTIONS)
        .where(CONTRIBUTIONS.c.run == plan.run, CONTRIBUTIONS.c.round == plan.round)
        .where(CONTRIBUTIONS.c.kind == plan.kind, CONTRIBUTIONS.c.site == plan.site)
        .where(CONTRIBUTIONS.c.verdict == "counted", CONTRIBUTIONS.c.attempt < plan.attempt)
        .where(CONTRIBUTIONS.c.digest.not_in(taken_back))
        .order_by(CONTRIBUTIONS.c.attempt.desc())
    )
    for row in (ContributionRow(*found) for found in db.execute(query)):
        header = Header.decode(row.header)
        if round_of(header.plan_id) < plan.round and accepts.takes(header.base):
            return row
    return None


def allowed(db: sa.Connection, plan: PlanRow) -> int:
    """How many rounds back work may come from; 0 for an exchange that is not of training."""
    if plan.kind != "train":
        return 0
    return int(find(db, plan.run).config.get("cohort", {}).get("stale", 0))


def _of_site(plan: PlanRow) -> sa.ColumnElement[bool]:
    of_run = (PLANS.c.run == plan.run) & (PLANS.c.kind == plan.kind)
    return of_run & (PLANS.c.site == plan.site)


def _next_accepts(db: sa.Connection, plan: PlanRow, base: str, stale: int) -> bool:
    """Whether the round behind the one that is being finished takes work from a base."""
    of_run = ROUNDS.c.state.in_(("planned", "closed", "held", "committed"))
    query = (
        sa.select(ROUNDS.c.round, ROUNDS.c.state, ROUNDS.c.base, ROUNDS.c.model)
        .where(ROUNDS.c.run == plan.run, of_run)
        .order_by(ROUNDS.c.round.desc())
        .limit(stale)
    )
    run, rounds = find(db, plan.run), db.execute(query).all()
    if run.state != "running" or not rounds or rounds[0].round >= run.rounds:
        return False
    if rounds[0].state == "planned":
        return False  # it is open, and does not take it
    newest = [rounds[0].model] if rounds[0].state == "committed" else []
    return base in (*newest, *(one.base for one in rounds))
