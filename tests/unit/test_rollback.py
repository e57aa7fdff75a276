"""Going back: the ledger keeps what was taken back, and nothing after it knows of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.holding import after_rejected, in_a_row
from orchestrator.ledger import RunRow
from orchestrator.retention import needed
from orchestrator.rollback import roll_back
from orchestrator.sessions import Sessions
from orchestrator.troubles import Troubles
from orchestrator.verifying import verify_run
from orchestrator.viewing import Viewing
from protos.errors import Conflict, NotFound
from tests.support.signed_run import RUN, SITES, SignedRun


@pytest.fixture
def run(tmp_path: Path) -> Iterator[SignedRun]:
    made = SignedRun(tmp_path)
    for number in (1, 2, 3):
        made.round(number, assess=False)
    made.ledger.set_run(RUN, state="stopped", reason="stopped by the operator", ended=2.0)
    yield made
    made.bench.close()


def back(run: SignedRun, number: int) -> RunRow:
    return roll_back(run.bench.engine, RUN, number)


def test_the_history_ends_with_the_round_and_the_rest_stays_on_record(run: SignedRun) -> None:
    ledger = run.ledger
    model = ledger.round(RUN, 1).model
    row = back(run, 1)
    assert (row.state, row.reason, row.ended, row.model) == ("queued", "", None, model)
    assert [one.round for one in ledger.history(RUN)] == [0, 1]
    last = ledger.last_committed(RUN)
    assert last is not None
    assert last.round == 1
    states = [one.state for one in ledger.rounds(RUN)]
    assert states == ["committed", "committed", "superseded", "superseded"]
    assert ledger.entries(RUN)[-1].kind == "rolled_back"
    assert verify_run(run.bench.engine, RUN).problems == ()


def test_a_site_starts_from_the_state_of_then(run: SignedRun) -> None:
    ledger = run.ledger
    then = {c.site: c.digest for c in ledger.contributions(RUN, 1, 1, "train")}
    later = ledger.last_counted(RUN, "east")
    back(run, 1)
    assert ledger.all_last_counted(RUN, SITES, before=2) == then
    assert ledger.last_counted(RUN, "east") == then["east"] != later


def test_what_was_taken_back_is_trained_again(run: SignedRun) -> None:
    """Also where it was carried over from an attempt that had been given up before."""
    ledger, base = run.ledger, run.ledger.run(RUN).model
    run.count(run.plan(4), base, ("east",))
    plans = run.plan(4, 2, abandoning="below the quorum")
    assert [one.site for one in ledger.carry_over(RUN, 4, 2)] == ["east"]
    run.count(plans, base, ("north",))
    run.finish(4, 2)
    back(run, 3)
    run.plan(4, 3)
    assert ledger.carry_over(RUN, 4, 3) == []
    run.count([p for p in ledger.plans(RUN, 4, 3) if p.kind == "train"], base)
    assert run.finish(4, 3).state == "committed"
    assert [one.round for one in ledger.history(RUN)] == [0, 1, 2, 3, 4]
    assert verify_run(run.bench.engine, RUN).problems == ()


def test_what_is_under_way_is_given_up(run: SignedRun) -> None:
    run.plan(4)
    run.ledger.set_run(RUN, state="paused")
    back(run, 2)
    assert run.ledger.attempts(RUN, 4)[0].state == "abandoned"
    assert run.ledger.open_rounds() == []
    assert verify_run(run.bench.engine, RUN).problems == ()


def test_numbers_of_rejected_rounds_are_free_again(run: SignedRun) -> None:
    ledger, base = run.ledger, run.ledger.run(RUN).model
    run.count(run.plan(4), base)
    ledger.close_round(RUN, 4, 1, None, "every site answered")
    ledger.hold_round(RUN, 4, 1, "worse", model=run.model(9.0), summary={"held": "worse"})
    ledger.set_run(RUN, state="paused")
    assert after_rejected(ledger, RUN) == 0
    ledger.abandon_round(RUN, 4, 1, "rejected: worse")
    assert after_rejected(ledger, RUN) == 5
    back(run, 2)
    assert after_rejected(ledger, RUN) == in_a_row(ledger, RUN) == 0
    states = [one.state for one in ledger.rounds(RUN)]
    assert states == ["committed"] * 3 + ["superseded"] * 2
    assert verify_run(run.bench.engine, RUN).problems == ()
    base = ledger.run(RUN).model
    run.count(run.plan(3, 2), base)
    run.finish(3, 2)
    run.plan(4, 2)
    assert ledger.carry_over(RUN, 4, 2) == []


def test_views_forget_what_was_taken_back(run: SignedRun) -> None:
    sessions = Sessions(1.0, lambda _: None, lambda _: None)
    troubles = Troubles(run.ledger, lambda *_: None)
    viewing = Viewing(run.ledger, run.bench.board, sessions, troubles)
    assert viewing.run(RUN).committed == 3
    back(run, 1)
    viewing.forget(RUN)
    view = viewing.run(RUN)
    assert (view.committed, view.best, view.state) == (1, 1, "queued")
    assert [one.state for one in viewing.rounds(RUN)] == ["committed", "superseded", "superseded"]


def test_models_that_were_taken_back_are_not_kept(run: SignedRun) -> None:
    taken = {run.ledger.round(RUN, n).model for n in (2, 3)}
    sent = {c.index for c in run.ledger.contributions(RUN, 3, 1)}
    retention = run.bench.engine.config.retention
    assert taken <= needed(run.bench.engine, run.ledger.run(RUN), retention)
    back(run, 1)
    kept = needed(run.bench.engine, run.ledger.run(RUN), retention)
    assert not (taken | sent) & kept


@pytest.mark.parametrize("state", ["queued", "running"])
def test_a_run_that_goes_on_is_stopped_first(run: SignedRun, state: str) -> None:
    run.ledger.set_run(RUN, state=state)  # type: ignore[arg-type]
    with pytest.raises(Conflict, match=f"it is {state}. Stop it first: `farflung stop r`"):
        back(run, 1)
    assert len(run.ledger.history(RUN)) == 4


def test_only_to_a_committed_round_with_others_after_it(run: SignedRun) -> None:
    with pytest.raises(Conflict, match="round 7 is not committed"):
        back(run, 7)
    with pytest.raises(Conflict, match="round 3 is the newest"):
        back(run, 3)


def test_not_under_a_run_that_started_from_it(run: SignedRun) -> None:
    child = replace(run.ledger.run(RUN), id="c", name="child", parent=(RUN, 2), state="queued")
    run.ledger.create_run(child)
    with pytest.raises(Conflict, match="run child started from a later round"):
        back(run, 1)
    run.ledger.set_run(RUN, state="stopped")
    back(run, 2)


def test_not_to_a_model_that_was_erased(run: SignedRun) -> None:
    run.bench.store.erase(run.ledger.round(RUN, 1).model, "asked to")
    with pytest.raises(NotFound, match=r"round 1 can't be gone back to: .* was erased: asked to"):
        back(run, 1)
    assert len(run.ledger.history(RUN)) == 4
