"""Step 6: one transaction. Before it the round does not exist; after it, it does."""

from __future__ import annotations

import math
import time
from typing import Any

from orchestrator.ledger import RoundRow
from orchestrator.rounds.engine import Assessment, Candidate, Engine, Planned
from orchestrator.rounds.gather import Closed
from orchestrator.views import Plugin
from protos.faults import reach
from protos.plan import Schedule


def commit(
    engine: Engine, planned: Planned, closed: Closed, candidate: Candidate, assessed: Assessment
) -> RoundRow:
    """Commit a closed round: model, outer state, memos, scores, maps, closed set."""
    row = planned.row
    document = summary(engine, planned, closed, candidate, assessed)
    reach("round.committing")
    return engine.ledger.commit_round(
        row.run,
        row.round,
        row.attempt,
        model=candidate.model.shared,
        outer_state=candidate.outer_state,
        memos=candidate.memos,
        summary=document,
    )


def summary(
    engine: Engine,
    planned: Planned,
    closed: Closed,
    candidate: Candidate,
    assessed: Assessment,
    held: str = "",
) -> dict[str, Any]:
    """What the round came to, for views and for the next round's plan; and why it is held."""
    draft = planned.row.draft
    change = candidate.relative_change
    schedule = Schedule.model_validate(draft["schedule"])
    rows = engine.board.rows()
    return {
        "frozen": candidate.model.frozen,
        "orchestrator": candidate.model.orchestrator,
        "relative_change": change if math.isfinite(change) else None,
        "counted": [c.site for c in closed.contributions],
        "missing": closed.missing,
        "unassessed": assessed.missing,
        "close_reason": closed.reason,
        "weights": candidate.weights,
        "payloads": candidate.payloads,
        "files": candidate.files,
        "plugins": [p.model_dump(mode="json") for p in _plugins(candidate, assessed)],
        "assessed": assessed.done,
        "scores": finite(assessed.scores),
        "site_scores": {s: finite(v) for s, v in assessed.sites.items()},
        "reliability": assessed.reliability,
        "calibration": assessed.calibration,
        "work": {k: v for k, v in draft["work"].items() if v is not None},
        "learning_rate": [schedule.lr, schedule.lr * schedule.decay],
        "seconds": engine.board.mean_seconds(rows),
        "wire_bytes": engine.board.wire_bytes(),
        "sites": [r.model_dump(mode="json") for r in rows],
        "devices": {**planned.before.summary.get("devices", {}), **closed.devices},
        "speeds": {
            **planned.before.summary.get("speeds", {}),
            **{site: speed.facts() for site, speed in closed.speeds.items()},
        },
        "finished": max(time.time(), planned.row.started),  # the clock may have been set back
        "held": held,
    }


def _plugins(candidate: Candidate, assessed: Assessment) -> list[Plugin]:
    """What each strategy reports: its own numbers, and those of what it remembers."""
    out = [*candidate.plugins, *assessed.plugins]
    named = {p.name for p in out}
    for name, memo in candidate.memos.items():
        numbers = {k: float(v) for k, v in memo.items() if isinstance(v, int | float)}
        if name not in named and numbers:
            out.append(Plugin(name=name, state="done", report=numbers))
    return out


def finite(values: dict[str, float]) -> dict[str, float]:
    """The scores that are numbers, as a round's summary has them."""
    return {k: v for k, v in values.items() if math.isfinite(v)}
