"""One round, top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from orchestrator.ledger import RoundRow, RunRow
from orchestrator.rounds.assess import assess
from orchestrator.rounds.commit import commit, summary
from orchestrator.rounds.engine import Assessment, Candidate, Engine, Planned, timed
from orchestrator.rounds.gate import hold_reason
from orchestrator.rounds.gather import Closed, gather
from orchestrator.rounds.plan import plan
from orchestrator.rounds.reduce import reduce
from orchestrator.rounds.refine import refine


@dataclass(frozen=True)
class Outcome:
    """How a try at a round ended.

    Attributes:
        state: committed; again (the attempt is given up, with the reason for the next one);
            held; interrupted.
        reason: In words.
        row: The committed round.
    """

    state: Literal["committed", "again", "held", "interrupted"]
    reason: str = ""
    row: RoundRow | None = None


def run_round(engine: Engine, run: RunRow, number: int, abandoning: str = "") -> Outcome:
    """Plan, gather, reduce, refine, assess, commit.

    Goes on where the ledger says that the round is: a restart of a planned round gathers, one of a
    closed round reduces again, to the same bits.

    Args:
        engine: The daemon's parts.
        run: The run.
        number: The round, from 1.
        abandoning: Why the attempt before is given up; empty if there is none.
    """
    planned = plan(engine, run, number, abandoning)
    cost = engine.store.index(planned.base.shared).nbytes
    with engine.store.reserve(cost * (len(planned.row.draft["cohort"]) + 3)):
        closed = gather(engine, planned)
        if not isinstance(closed, Closed):
            if closed.interrupted:
                return Outcome("interrupted")
            return Outcome("again", closed.decision.reason)
        engine.publish()
        with timed(engine.board, "reducing"):
            candidate = reduce(engine, planned, closed)
        with timed(engine.board, "refining"):
            candidate = refine(engine, planned, closed, candidate)
        if candidate.held:
            return _hold(engine, planned, closed, candidate, Assessment(), candidate.held)
        with timed(engine.board, "assessing"):
            found = assess(engine, planned, closed, candidate)
        if found is None:
            return Outcome("interrupted")
        candidate, assessed = found
        held = candidate.held or hold_reason(engine, planned, closed, candidate, assessed)
        if held:
            return _hold(engine, planned, closed, candidate, assessed, held)
        with timed(engine.board, "committing"):
            committed = commit(engine, planned, closed, candidate, assessed)
    return Outcome("committed", row=committed)


def _hold(
    engine: Engine,
    planned: Planned,
    closed: Closed,
    candidate: Candidate,
    assessed: Assessment,
    reason: str,
) -> Outcome:
    row = planned.row
    engine.ledger.hold_round(
        row.run,
        row.round,
        row.attempt,
        reason,
        model=candidate.model.shared,
        outer_state=candidate.outer_state,
        memos=candidate.memos,
        summary=summary(engine, planned, closed, candidate, assessed, reason),
    )
    return Outcome("held", reason)
