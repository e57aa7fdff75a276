"""Work for an earlier round in a later one: where the run file allows it, once, and checkable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.ledger import Acceptance, PlanRow, older
from orchestrator.ledger.transcript import transcript
from orchestrator.ledger.verification import verify
from orchestrator.rounds.plan import plan
from orchestrator.run_config import parse_run
from orchestrator.verifying import verify_run
from protos.errors import ConfigInvalid, NotYet
from protos.plan import Plan, StrategyChoice
from strategies.context import Cohort
from strategies.stack import Stack
from tests.support.signed_run import MODEL, RUN, SignedRun
from tests.support.workbench import Workbench

OTHERS = ("east", "south")
Made = Callable[[int], SignedRun]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    runs: list[SignedRun] = []

    def make(stale: int) -> SignedRun:
        run = SignedRun(tmp_path / str(len(runs)), stale=stale)
        run.ledger.set_run(RUN, state="running")
        runs.append(run)
        return run

    yield make
    for run in runs:
        run.bench.close()


def without_north(run: SignedRun, number: int) -> tuple[PlanRow, str]:
    """A committed round that north was too slow for: its plan, and the base."""
    base = run.ledger.run(RUN).model
    plans = run.plan(number)
    run.count(plans, base, OTHERS)
    run.finish(number, assess=False)
    return next(p for p in plans if p.site == "north"), base


def accept(run: SignedRun, of: tuple[PlanRow, str], more: float = 0.0) -> Acceptance:
    return run.ledger.accept(run.sent(*of, more))


def problems(run: SignedRun) -> list[str]:
    found, _ = verify(transcript(run.ledger, RUN), run.authority.certificate)
    assert [p.text for p in verify_run(run.bench.engine, RUN).problems] == [
        p.text for p in found.problems
    ]
    return [p.text for p in found.problems]


def test_it_counts_in_the_round_that_is_open_in_place_of_the_sites_own(made: Made) -> None:
    run = made(1)
    ledger = run.ledger
    slow = without_north(run, 1)
    assert ledger.last_counted(RUN, "north") == ""
    base = ledger.run(RUN).model
    own = run.plan(2)
    sent = run.sent(*slow)
    for again in (False, True):
        answer = ledger.accept(sent)
        assert answer == Acceptance("counted", f"{RUN}/2/1/train", again=again)
    assert [p.site for p in ledger.open_plans("north")] == []
    assert ledger.accept(run.sent(own[1], base)).verdict == "refused"
    run.count(own, base, OTHERS)
    assert [c.digest for c in ledger.contributions(RUN, 2, 1)].count(sent.digest) == 1
    elsewhere = ledger.counted_for(slow[0])
    assert elsewhere is not None
    assert (elsewhere.id, elsewhere.contribution) == (f"{RUN}/2/1/train", sent.digest)
    run.finish(2, assess=False)
    assert ledger.last_counted(RUN, "north") == sent.digest
    assert sent.index not in ledger.only_of_round(RUN, 1), "it is kept as long as round 2"
    assert problems(run) == []


def test_between_two_rounds_it_is_to_be_sent_again(made: Made) -> None:
    run = made(1)
    base = run.ledger.run(RUN).model
    plans = run.plan(1)
    slow = (plans[1], base)
    run.count(plans, base, OTHERS)
    run.ledger.awaits(slow[0], base)  # it is open
    run.ledger.close_round(RUN, 1, 1, None, "the deadline passed")
    for committed in (False, True):
        if committed:
            run.ledger.commit_round(RUN, 1, 1, model=run.model(1.0))
        with pytest.raises(NotYet, match="north: round 1 is closed"):
            accept(run, slow)
        with pytest.raises(NotYet):
            run.ledger.awaits(slow[0], base)
    run.plan(2)
    run.ledger.awaits(slow[0], base)
    assert accept(run, slow).plan_id == f"{RUN}/2/1/train"


@pytest.mark.parametrize("why", ["not allowed", "paused", "last round", "too old", "other base"])
def test_it_is_late_where_no_round_will_take_it(made: Made, why: str) -> None:
    run = made(0 if why == "not allowed" else 1)
    slow = without_north(run, 9 if why == "last round" else 1)
    if why == "paused":
        run.ledger.set_run(RUN, state="paused")
    if why == "too old":
        without_north(run, 2)
        run.plan(3)
    if why == "other base":
        run.stale = 0
        run.plan(2)
    assert accept(run, slow).verdict == "late"
    assert accept(run, slow).again
    assert problems(run) == []


def test_it_goes_on_to_another_attempt_of_the_round(made: Made) -> None:
    run = made(2)
    slow = without_north(run, 1)
    base = run.ledger.run(RUN).model
    run.count(run.plan(2), base, ("east",))
    assert accept(run, slow).verdict == "counted"
    again = run.plan(2, 2, abandoning="below the quorum")
    carried = run.ledger.carry_over(RUN, 2, 2)
    assert [row.site for row in carried] == ["east", "north"]
    assert accept(run, slow) == Acceptance("counted", f"{RUN}/2/2/train", again=True)
    run.count(again, base, ("south",))
    run.finish(2, 2, assess=False)
    assert len(run.ledger.round(RUN, 2).closed_set) == 3
    run.ledger.set_run(RUN, state="stopped")
    run.ledger.roll_back(RUN, 1, "rolled back")
    run.plan(2, 3)
    assert run.ledger.carry_over(RUN, 2, 3) == [], "what was taken back is not wanted again"
    assert problems(run) == []


def test_only_one_contribution_to_a_plan_counts_later(made: Made) -> None:
    run = made(2)
    slow = without_north(run, 1)
    base = run.ledger.run(RUN).model
    run.count(run.plan(2), base, OTHERS)
    assert accept(run, slow).verdict == "counted"
    run.finish(2, assess=False)
    run.plan(3)
    assert accept(run, slow, more=5.0).verdict == "late"


# -- what a check finds ------------------------------------------------------------------------------


def test_a_run_that_does_not_allow_it_is_found_out(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(0)
    slow = without_north(run, 1)
    run.stale = 1
    run.plan(2)
    with monkeypatch.context() as patch:
        patch.setattr(older, "allowed", lambda db, plan: 1)
        assert accept(run, slow).verdict == "counted"
    assert any("from a base that the run does not allow" in text for text in problems(run))


def test_a_base_that_is_not_taken_is_found_out(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(1)
    slow = without_north(run, 1)
    without_north(run, 2)
    run.plan(3)
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "takes", lambda self, base: True)
        assert accept(run, slow).verdict == "counted"
    (text,) = problems(run)
    assert "(accepted, round 3, site north): it is work for round 1" in text
    assert "not taken" in text


def test_work_that_was_not_asked_for_is_found_out(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(1)
    plan, base = without_north(run, 1)
    run.plan(2)
    real = older.later_plan
    with monkeypatch.context() as patch:
        patch.setattr(older, "later_plan", lambda db, plan, b, lock: real(db, plan, base, lock))
        assert accept(run, (plan, "0" * 64)).verdict == "counted"
    assert any("the site was not asked for this work in round 1" in text for text in problems(run))


def test_a_second_one_to_the_same_plan_is_found_out(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(2)
    slow = without_north(run, 1)
    base = run.ledger.run(RUN).model
    run.count(run.plan(2), base, OTHERS)
    assert accept(run, slow).verdict == "counted"
    run.finish(2, assess=False)
    run.plan(3)
    monkeypatch.setattr(older, "counted_for", lambda db, plan: None)
    assert accept(run, slow, more=5.0).verdict == "counted"
    (text,) = problems(run)
    assert "another contribution to the same plan was counted" in text


# -- what a plan takes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stale", [0, 1, 2])
def test_a_plan_takes_work_of_the_newest_rounds_that_asked_for_the_same(
    tmp_path: Path, stale: int
) -> None:
    bench = Workbench(tmp_path)
    bench.enrol("east", "north")
    strategy = '[{ name = "fedprox", rounds = [2, 99] }]'
    row = bench.run("r", rounds=9, cohort=f"{{ quorum = 1, stale = {stale} }}", strategy=strategy)
    bench.commit("r", 0)
    bases = []
    for number in range(1, 6):
        planned = plan(bench.engine, row, number)
        bases.append(planned.row.base)
        made = [Plan.decode(p.plan) for p in bench.ledger.plans("r", number, 1)]
        assert len({p.accepts for p in made}) == 1
        alike = bases[1 if number > 1 else 0 :]  # in round 1 no strategy acted
        assert made[0].accepts == tuple(reversed(alike))[: stale + 1]
        assert ("accepts" in planned.row.draft) == bool(stale)
        bench.ledger.close_round("r", number, 1, None, "the deadline passed")
        tensors = {"w": torch.full((3,), float(number)), "b": torch.zeros(2)}
        model = bench.put_model(MODEL, tensors)
        bench.ledger.commit_round("r", number, 1, model=model)
    bench.close()


# -- weight and configuration -------------------------------------------------------------------------


def test_the_weight_falls_with_the_root_of_the_age() -> None:
    def weights(*ages: int, stack: Stack | None = None) -> torch.Tensor:
        cohort = Cohort(
            sites=("a", "b", "c"),
            examples=torch.tensor([30.0, 30.0, 60.0], dtype=torch.float64),
            losses=torch.zeros(3, dtype=torch.float64),
            staleness=torch.tensor(ages),
        )
        return (stack or Stack(())).weigh(cohort)[:, 0]

    assert weights(0, 0, 0).tolist() == [0.25, 0.25, 0.5]
    assert weights(0, 3, 0).tolist() == pytest.approx([2 / 7, 1 / 7, 4 / 7], abs=1e-15)
    empty = replace(
        Cohort(("a", "b"), torch.zeros(2), torch.zeros(2), torch.tensor([0, 3])),
        examples=torch.zeros(2, dtype=torch.float64),
    )
    assert Stack(()).weigh(empty)[:, 0].tolist() == pytest.approx([2 / 3, 1 / 3], abs=1e-15)


def test_a_quorum_of_all_has_no_use_for_it() -> None:
    file = 'name = "r"\nrounds = 2\n[task]\nname = "t"\n[cohort]\nstale = 1\n'
    with pytest.raises(ConfigInvalid, match='stale needs a quorum below "all"'):
        parse_run(file)
    assert parse_run(file + "quorum = 2\n").cohort.stale == 1


@pytest.mark.parametrize(
    ("name", "params", "lasts"),
    [
        ("co_learning", {}, True),
        ("int8", {}, True),
        ("feddf", {}, True),
        ("feddf", {"teacher": "calibration"}, False),
        ("student", {"teacher": "calibration"}, False),
        ("feature_replay", {}, False),
        ("fyi", {}, False),
    ],
)
def test_what_describes_a_model_does_not_last(
    name: str, params: dict[str, object], lasts: bool
) -> None:
    (strategy,) = Stack([StrategyChoice(name=name, params=params)]).strategies
    assert strategy.lasts == lasts
