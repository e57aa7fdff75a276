"""Contributions in the ledger: what came, and what of it counts, exactly once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from orchestrator.ledger import chain, older, tables
from orchestrator.ledger.plans import (
    Plans,
    find_plan,
    in_open_exchange,
    is_open,
    lock_exchange,
    no_plan,
    of_attempt,
    select_plans,
    set_answer,
)
from orchestrator.ledger.rows import Acceptance, ContributionRow, PlanKind, PlanRow
from orchestrator.ledger.runs import find
from orchestrator.ledger.statement import Statement
from protos.contribution import Header
from protos.digest import digest
from protos.errors import NotFound
from protos.faults import reach

CONTRIBUTIONS, PLANS, ROUNDS = tables.contributions, tables.plans, tables.rounds

_FIND = Statement(
    sa.select(CONTRIBUTIONS).where(CONTRIBUTIONS.c.digest == sa.bindparam("the_digest"))
)
_INSERT = Statement(sa.insert(CONTRIBUTIONS))
_COUNTED = Statement(
    sa.select(CONTRIBUTIONS)
    .join(PLANS, PLANS.c.contribution == CONTRIBUTIONS.c.digest)
    .where(*(PLANS.c[name] == sa.bindparam(f"the_{name}") for name in ("run", "round", "attempt")))
)

LAST = 2**31 - 1
"""Behind the number of every round."""

_OF_ONE_ATTEMPT = sa.and_(*(ROUNDS.c[key] == PLANS.c[key] for key in ("run", "round", "attempt")))
_NEWEST_ROUND = (
    sa.select(sa.func.max(ROUNDS.c.round))
    .where(ROUNDS.c.run == sa.bindparam("the_run"), ROUNDS.c.state == "committed")
    .where(ROUNDS.c.round < sa.bindparam("the_round"))
    .scalar_subquery()
)
_NEWEST_SET = Statement(
    sa.select(PLANS.c.site, PLANS.c.contribution, ROUNDS.c.closed_set)
    .join(ROUNDS, _OF_ONE_ATTEMPT)
    .where(PLANS.c.kind == "train", PLANS.c.contribution.is_not(None))
    .where(ROUNDS.c.run == sa.bindparam("the_run"), ROUNDS.c.round == _NEWEST_ROUND)
    .where(ROUNDS.c.state == "committed")
)
_OF_ROUND = (CONTRIBUTIONS.c.run == sa.bindparam("the_run")) & (
    CONTRIBUTIONS.c.round == sa.bindparam("the_round")
)
_ONLY_THERE = Statement(
    sa.select(CONTRIBUTIONS.c.index)
    .where(CONTRIBUTIONS.c.index.in_(sa.select(CONTRIBUTIONS.c.index).where(_OF_ROUND)))
    .group_by(CONTRIBUTIONS.c.index)
    .having(sa.func.sum(sa.case((_OF_ROUND, 0), else_=1)) == 0)
)


class Contributions(Plans):
    """The part of the ledger that says which work counts."""

    def accept(self, row: ContributionRow) -> Acceptance:
        """Count a contribution whose bytes are in the store, or say that it is too late.

        In one transaction: counted if its exchange is open; also if it is not, but another plan
        of the same run, round, kind and site asks for the same work and is open, or the site's plan
        of a later round takes work from its base. Otherwise late, recorded without header and
        signature. Whoever asks again hears the same. A second contribution to a plan that has one
        is refused.

        Raises:
            NotFound: The site has no such plan.
            NotYet: The next round takes it, and is not open yet.
        """
        now = self._clock()
        return self._written(lambda db: _accept(db, row, now))

    def carry_over(self, run: str, round: int, attempt: int) -> list[ContributionRow]:
        """Count finished work of abandoned attempts for the plans that ask for it again.

        Gives the contributions that count now and did not before, by site.
        """
        if attempt == 1:
            return []  # there is none before it
        now = self._clock()
        carried = []
        with self._writing() as db:
            attempts = of_attempt(PLANS, run, round, attempt)
            for plan in select_plans(db, attempts, is_open(), PLANS.c.answer == ""):
                if not lock_exchange(db, run, round, attempt, plan.kind):
                    continue
                done = _finished(db, plan) or older.carried(db, plan, _taken_back(plan))
                if done is not None:
                    set_answer(db, plan, "counted", now, contribution=done.digest)
                    document = {"contribution": done.digest, "plan": plan.id}
                    chain.append(db, run, "carried", now, document)
                    carried.append(done)
                    reach("carry.counted")
        return sorted(carried, key=lambda row: row.site)

    def awaits(self, plan: PlanRow, base: str) -> None:
        """Look at a closed plan before the bytes of a contribution to it are taken.

        Raises:
            NotYet: The next round takes it, and is not open yet.
        """
        with self._reading() as db:
            if not plan.answer and not in_open_exchange(db, plan):
                older.later_plan(db, plan, base, lock=False)

    def counted_for(self, plan: PlanRow) -> PlanRow | None:
        """The plan of a later round for which a contribution to a plan counts; None if none does."""
        with self._reading() as db:
            return older.counted_for(db, plan)

    def contributions(
        self, run: str, round: int, attempt: int, kind: PlanKind | None = None
    ) -> list[ContributionRow]:
        """The contributions that count for an attempt, by site; carried ones included."""
        key = {"the_run": run, "the_round": round, "the_attempt": attempt}
        with self._reading() as db:
            rows = [ContributionRow(*row) for row in _COUNTED.all(db, key)]
        return sorted(
            (row for row in rows if kind in (None, row.kind)), key=lambda row: (row.kind, row.site)
        )

    def only_of_round(self, run: str, round: int) -> list[str]:
        """Artefacts of the contributions to a round, whatever came of them, that no other round has."""
        key = {"the_run": run, "the_round": round}
        with self._reading() as db:
            return [row.index for row in _ONLY_THERE.all(db, key)]

    def contribution(self, name: str) -> ContributionRow:
        """One contribution, counted or late.

        Args:
            name: Its digest.

        Raises:
            NotFound: There is none of that digest.
        """
        with self._reading() as db:
            found = _find(db, name)
        if found is None:
            raise NotFound(f"contribution {name[:12]}: not in the ledger", digest=name[:64])
        return found

    def all_last_counted(
        self, run: str, sites: Sequence[str], before: int | None = None
    ) -> dict[str, str]:
        """`last_counted` of many sites at once: in a long run one look at its newest round."""
        key = {"the_run": run, "the_round": LAST if before is None else before}
        with self._reading() as db:
            rows = _NEWEST_SET.all(db, key)
        inside = set(json.loads(rows[0].closed_set)) if rows else set()
        found = {row.site: row.contribution for row in rows if row.contribution in inside}
        return {s: found.get(s) or self.last_counted(run, s, before) for s in sites}

    def last_counted(self, run: str, site: str, before: int | None = None) -> str:
        """Digest of the newest ``train`` contribution of a site in a run's history.

        The history is the closed sets of the committed rounds, then those of the run that it was
        started from, up to that round, and so on.

        Args:
            run: Id of the run.
            site: The site.
            before: Only rounds before this one; None for all.

        Returns:
            The digest; empty if nothing of that site is in the history.
        """
        with self._reading() as db:
            at = find(db, run)
            while True:
                digest, parent = _newest(db, at.id, site, before), at.parent
                if digest or parent is None:
                    return digest
                at, before = find(db, parent[0]), parent[1] + 1


def _find(db: sa.Connection, digest: str) -> ContributionRow | None:
    row = _FIND.first(db, {"the_digest": digest})
    return None if row is None else ContributionRow(*row)


def _accept(db: sa.Connection, row: ContributionRow, now: float) -> Acceptance:
    known = _find(db, row.digest)
    if known is not None:
        return _again(db, known, row.site)
    plan = find_plan(db, row.plan_id, row.site, lock=True)
    if plan is None:
        raise no_plan(row.plan_id, row.site)
    if plan.work_digest != row.work_digest:
        return _refused(plan, f"plan {plan.id} asks for other work")
    target = _open_target(db, plan)
    if target is None:
        if plan.answer in ("counted", "refused"):
            return _refused(plan, f"plan {plan.id} has its answer: {plan.answer}")
        if older.allowed(db, plan):
            base = Header.decode(row.header).base
            target = older.later_plan(db, plan, base, lock=True)
    if target is None:
        _insert(db, plan, row, "late")
        set_answer(db, plan, "late", now)
        reach("accept.late")
        return Acceptance("late", plan.id, _late(plan.id))
    if target.answer in ("counted", "refused", "late"):
        return _refused(target, f"plan {target.id} has its answer: {target.answer}")
    _insert(db, target if target.round != plan.round else plan, row, "counted")
    reach("accept.inserted")
    set_answer(db, target, "counted", now, contribution=row.digest)
    reach("accept.answered")
    document = {
        "contribution": row.digest,
        "plan": target.id,
        "signature": digest(row.signature),
        "certificate": row.fingerprint,
    }
    chain.append(db, plan.run, "accepted", now, document)
    reach("accept.chained")
    return Acceptance("counted", target.id)


def _again(db: sa.Connection, known: ContributionRow, site: str) -> Acceptance:
    """The answer that was given before."""
    if known.site != site:
        return Acceptance("refused", known.plan_id, "the contribution is another site's")
    if known.verdict == "late":
        return Acceptance("late", known.plan_id, _late(known.plan_id), again=True)
    counts_for = select_plans(db, PLANS.c.contribution == known.digest)
    plan_id = counts_for[-1].id if counts_for else known.plan_id
    return Acceptance("counted", plan_id, again=True)


def _late(plan_id: str) -> str:
    return f"plan {plan_id}: its exchange was closed before this came"


def _refused(plan: PlanRow, reason: str) -> Acceptance:
    return Acceptance("refused", plan.id, reason)


def _open_target(db: sa.Connection, plan: PlanRow) -> PlanRow | None:
    """The plan that the work counts for: its own, which is locked, or the one of another attempt."""
    if lock_exchange(db, plan.run, plan.round, plan.attempt, plan.kind):
        return plan
    same = select_plans(db, _same_work(PLANS, plan), is_open())
    for other in same:
        if lock_exchange(db, other.run, other.round, other.attempt, other.kind):
            return find_plan(db, other.id, other.site, lock=True)
    return None


def _same_work(table: sa.Table, plan: PlanRow) -> sa.ColumnElement[bool]:
    keys = ("run", "round", "kind", "site", "work_digest")
    return sa.and_(*(table.c[key] == getattr(plan, key) for key in keys))


def _finished(db: sa.Connection, plan: PlanRow) -> ContributionRow | None:
    """The newest contribution of another attempt that did the same work.

    Not of one that was taken back: whoever rolls a run back does not want the same again.
    """
    query = (
        sa.select(CONTRIBUTIONS)
        .where(_same_work(CONTRIBUTIONS, plan), CONTRIBUTIONS.c.verdict == "counted")
        .where(CONTRIBUTIONS.c.attempt < plan.attempt)
        .where(CONTRIBUTIONS.c.digest.not_in(_taken_back(plan)))
        .order_by(CONTRIBUTIONS.c.attempt.desc())
        .limit(1)
    )
    row = db.execute(query).first()
    return None if row is None else ContributionRow(*row)


def _taken_back(plan: PlanRow) -> sa.Select[Any]:
    """What counted for attempts of a plan's round that were committed and rolled back."""
    return (
        sa.select(PLANS.c.contribution)
        .join(ROUNDS, _OF_ONE_ATTEMPT)
        .where(ROUNDS.c.run == plan.run, ROUNDS.c.round == plan.round)
        .where(ROUNDS.c.state == "superseded", PLANS.c.contribution.is_not(None))
    )


def _insert(db: sa.Connection, plan: PlanRow, row: ContributionRow, verdict: str) -> None:
    values: dict[str, Any] = {name: getattr(row, name) for name in ContributionRow.__slots__}
    for key in ("run", "round", "attempt", "kind"):  # the plan's, whatever the row says
        values[key] = getattr(plan, key)
    values["verdict"] = verdict
    if verdict == "late":
        values["header"] = values["signature"] = b""
    _INSERT.change(db, values)


def _newest(db: sa.Connection, run: str, site: str, before: int | None) -> str:
    query = (
        sa.select(PLANS.c.contribution, ROUNDS.c.closed_set)
        .join(ROUNDS, _OF_ONE_ATTEMPT)
        .where(ROUNDS.c.run == run, ROUNDS.c.state == "committed")
        .where(PLANS.c.site == site, PLANS.c.kind == "train", PLANS.c.contribution.is_not(None))
        .order_by(ROUNDS.c.round.desc())
    )
    if before is not None:
        query = query.where(ROUNDS.c.round < before)
    for name, closed_set in db.execute(query):
        if name in json.loads(closed_set):
            return str(name)
    return ""
