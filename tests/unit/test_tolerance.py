"""The gate: a plug-in that costs more than the run tolerates has no part in the round."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.exchange import Gathered
from orchestrator.gathering import Decision
from orchestrator.rounds import assess as assess_module
from orchestrator.rounds import page as page_module
from orchestrator.rounds.engine import Assessment, Candidate, Model, Planned
from orchestrator.rounds.gather import Closed
from orchestrator.rounds.page import Outcome, run_round
from orchestrator.rounds.tolerance import too_much_worse
from orchestrator.views import Plugin
from protos.manifest import Manifest
from tests.support.workbench import Workbench, of_spec

CLOSED = Gathered(Decision("close", "every site answered"), ("north",), {})
ABANDONED = Gathered(Decision("abandon", "below the quorum"), (), {"north": "gone"})
INTERRUPTED = Gathered(Decision("wait"), (), {"north": "gone"}, interrupted=True)


@pytest.mark.parametrize(
    ("before", "after", "tolerance", "words"),
    [
        ({"val.accuracy": 0.9}, {"val.accuracy": 0.95}, 0.0, ""),
        ({"val.accuracy": 0.9}, {"val.accuracy": 0.9}, 0.0, ""),
        ({"val.accuracy": 0.75}, {"val.accuracy": 0.5}, 0.25, ""),
        ({"val.accuracy": 0.9}, {"val.accuracy": 0.88}, 0.01, "fell by 2.00 points, from 90.00 %"),
        ({"val.accuracy": 0.9}, {"val.accuracy": 0.88}, 0.01, "1 are tolerated"),
        ({"val.loss": 2.0}, {"val.loss": 2.5}, 0.25, ""),
        ({"val.loss": 2.0}, {"val.loss": 2.6}, 0.25, "loss rose from 2 to 2.6; 25 % of it"),
        ({"val.loss": 2.0}, {"val.loss": math.nan}, 9.0, "loss rose"),
        ({"val.loss": -2.0}, {"val.loss": -1.0}, 0.25, "loss rose"),
        # Accuracy decides where there is one; a loss may then do what it likes.
        ({"val.accuracy": 0.9, "val.loss": 1}, {"val.accuracy": 0.9, "val.loss": 9}, 0.0, ""),
        ({"test.accuracy": 0.9}, {"test.accuracy": 0.9}, 1.0, "did not assess it both"),
        ({}, {"val.accuracy": 0.9}, 1.0, "did not assess it both"),
    ],
)
def test_what_is_tolerated(
    before: dict[str, float], after: dict[str, float], tolerance: float, words: str
) -> None:
    said = too_much_worse(before, after, tolerance)
    assert words in said
    assert bool(said) == bool(words)


class Bench:
    """A round whose plug-in changed the average; the sites' answers are as a test says."""

    def __init__(self, work: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work, self.set = work, monkeypatch.setattr
        self.assessed = 0.0
        work.enrol("north")
        self.run = work.run("r")
        manifest = Manifest((of_spec("w", (2,)),))
        base, refined = (work.put_model(manifest, {"w": torch.full((2,), v)}) for v in (0.0, 1.0))
        work.commit("r", 0, base)
        planned = work.planned(base)
        more = {"cohort": ["north"], "work": {"epochs": 1.0}, "schedule": {"lr": 0.1}}
        draft = {**planned.row.draft, **more}
        self.planned: Planned = replace(
            planned, row=replace(planned.row, draft=draft), run=self.run
        )
        self.average = Candidate(Model(base), "", 0.5, {"north": 1.0}, {"feddf": {"steps": 0}})
        done = Plugin(name="feddf", state="done", report={"loss": 1.0}, seconds=2.0)
        failed = Plugin(name="tree", state="skipped", reason="no data")
        self.refined = replace(
            self.average,
            model=Model(refined),
            memos={"feddf": {"steps": 9}},
            plugins=(done, failed),
            average=self.average,
        )
        self.asked: list[tuple[str, str]] = []
        self.committed: list[tuple[Candidate, Assessment]] = []
        self.held: list[dict[str, Any]] = []
        for step in ("gather", "reduce"):
            self.set(page_module, step, lambda *_: Closed(()))
        self.set(page_module, "refine", lambda *_: self.refined)
        self.set(page_module, "commit", lambda *steps: self.committed.append(steps[3:]))
        self.set(work.ledger, "hold_round", lambda *_, **kept: self.held.append(kept))

    def go(
        self, scores: dict[str, Any], tolerance: float | None = 0.01, **run_file: Any
    ) -> Outcome:
        """A round; ``scores`` are those of an exchange by its kind, or how it ended."""
        config = self.planned.config.model_copy(update={"tolerance": tolerance, **run_file})
        planned = replace(self.planned, config=config)
        self.set(page_module, "plan", lambda *_: planned)

        def exchange(_engine: Any, _planned: Any, candidate: Candidate, kind: str, _: Any) -> Any:
            self.asked.append((kind, candidate.model.shared))
            answer = scores[kind]
            return CLOSED if isinstance(answer, float) else answer

        def evaluate(_engine: Any, _planned: Any, kind: str, calibrate: bool) -> dict[str, Any]:
            split = "val" if calibrate else "val_calibrated"
            found = {f"{split}.accuracy": scores[kind]}
            return {
                "scores": found,
                "sites": {"north": found},
                "reliability": {},
                "calibration": {"temperature": {"of": kind}} if calibrate else {},
                "settled": {},
                "awaited": False,
                "failed": {},
                "reports": {},
            }

        self.set(assess_module, "_exchange", exchange)
        self.set(assess_module, "evaluate", evaluate)
        return run_round(self.work.engine, self.run, 1)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    work = Workbench(tmp_path)
    yield Bench(work, monkeypatch)
    work.close()


def test_without_a_tolerance_nobody_judges(bench: Bench) -> None:
    assert bench.go({"assess": 0.1, "reassess": 0.1}, tolerance=None).state == "committed"
    assert [kind for kind, _ in bench.asked] == ["assess", "reassess"]
    assert bench.committed[0][0] is bench.refined


def test_what_is_good_enough_is_committed_with_its_own_scores(bench: Bench) -> None:
    bench.go({"assess": 0.895, "baseline": 0.9, "reassess": 0.895})
    shared, average = bench.refined.model.shared, bench.average.model.shared
    assert bench.asked == [("assess", shared), ("baseline", average), ("reassess", shared)]
    ((candidate, assessed),) = bench.committed
    assert candidate is bench.refined
    assert assessed.scores["val.accuracy"] == 0.895
    assert assessed.calibration == {"temperature": {"of": "assess"}}


def test_what_is_worse_is_left_out_with_its_reason_and_the_average_is_committed(
    bench: Bench,
) -> None:
    bench.go({"assess": 0.8, "baseline": 0.9, "reassess": 0.9})
    ((candidate, assessed),) = bench.committed
    assert candidate.model == bench.average.model
    assert candidate.memos == bench.average.memos
    plugins = {p.name: p for p in candidate.plugins}
    assert plugins["feddf"].state == "skipped"
    assert "fell by 10.00 points" in plugins["feddf"].reason
    assert plugins["feddf"].report == {"loss": 1.0}
    assert plugins["tree"].reason == "no data"
    assert assessed.scores == {"val.accuracy": 0.9, "val_calibrated.accuracy": 0.9}
    assert assessed.calibration == {"temperature": {"of": "baseline"}}
    assert bench.asked[-1] == ("reassess", bench.average.model.shared)


def test_it_is_held_where_the_run_says_so(bench: Bench) -> None:
    outcome = bench.go({"assess": 0.8, "baseline": 0.9}, on_error="hold")
    assert outcome.state == "held"
    assert "strategy feddf was held in round 1: validation accuracy fell" in outcome.reason
    assert bench.committed == []
    (kept,) = bench.held
    assert kept["model"] == bench.average.model.shared
    assert kept["summary"]["scores"] == {"val.accuracy": 0.9}


@pytest.mark.parametrize("unanswered", ["assess", "baseline"])
def test_what_nobody_could_judge_is_left_out(bench: Bench, unanswered: str) -> None:
    bench.go({"assess": 0.95, "baseline": 0.9, unanswered: ABANDONED})
    ((candidate, assessed),) = bench.committed
    assert candidate.model == bench.average.model
    assert "did not assess it both" in candidate.plugins[-1].reason
    assert not assessed.done
    assert assessed.missing == {"north": "gone"}


@pytest.mark.parametrize("kind", ["assess", "baseline", "reassess"])
def test_an_interruption_commits_nothing(bench: Bench, kind: str) -> None:
    scores = {"assess": 0.95, "baseline": 0.9, "reassess": 0.95, kind: INTERRUPTED}
    assert bench.go(scores).state == "interrupted"
    assert bench.committed == []
    assert bench.asked[-1][0] == kind


def test_a_round_that_would_not_be_assessed_is_if_it_has_to_be_judged(bench: Bench) -> None:
    never = bench.planned.config.assess.model_copy(update={"every": 0})
    bench.go({"assess": 0.95, "baseline": 0.9, "reassess": 0.95}, assess=never)
    assert bench.committed[0][1].done


# -- several plug-ins -------------------------------------------------------------------------------


def several(bench: Bench, worth: dict[str, float], **run_file: Any) -> tuple[Outcome, list[str]]:
    """A round with two plug-ins, each of which changes the accuracy of what it is given by so much.

    Gives also what was asked, in order.
    """
    manifest = Manifest((of_spec("w", (2,)),))
    accuracy = {bench.average.model.shared: 0.5}
    asked: list[str] = []

    def refined_by(_e: Any, _p: Any, _c: Any, given: Candidate, name: str) -> Candidate:
        asked.append(f"refine {name}")
        plugin = Plugin(name=name, state="done", report={"loss": 1.0})
        plugins = (*given.plugins, plugin)
        if not worth[name]:
            return replace(given, plugins=plugins)
        found = accuracy[given.model.shared] + worth[name]
        model = bench.work.put_model(manifest, {"w": torch.full((2,), found)})
        accuracy[model] = found
        return replace(given, model=Model(model), plugins=plugins)

    def exchange(_e: Any, _p: Any, candidate: Candidate, kind: str, _: Any) -> Gathered:
        asked.append(f"{kind} {accuracy[candidate.model.shared]:.1f}")
        bench.assessed = accuracy[candidate.model.shared]
        return CLOSED

    def evaluate(*_: Any) -> dict[str, Any]:
        empty = ("reliability", "calibration", "settled", "reports", "failed")
        nothing: dict[str, Any] = {key: {} for key in empty}
        found = {"val.accuracy": bench.assessed}
        return {**nothing, "scores": found, "sites": {"north": found}, "awaited": False}

    config = bench.planned.config.model_copy(update={"tolerance": 0.01, **run_file})
    planned = replace(bench.planned, config=config)
    candidate = bench.average
    for name in worth:
        candidate = refined_by(None, None, None, candidate, name)
    asked.clear()
    bench.set(page_module, "plan", lambda *_: planned)
    bench.set(page_module, "refine", lambda *_: replace(candidate, average=bench.average))
    bench.set(assess_module, "refined_by", refined_by)
    bench.set(assess_module, "_exchange", exchange)
    bench.set(assess_module, "evaluate", evaluate)
    return run_round(bench.work.engine, bench.run, 1), asked


def test_the_good_one_of_two_stays(bench: Bench) -> None:
    for worth, bad in (({"a": -0.3, "b": 0.2}, "a"), ({"a": 0.2, "b": -0.3}, "b")):
        bench.committed.clear()
        _, asked = several(bench, worth)
        ((candidate, assessed),) = bench.committed
        states = {p.name: p.state for p in candidate.plugins}
        assert states == {name: "skipped" if name == bad else "done" for name in worth}
        assert assessed.scores["val.accuracy"] == pytest.approx(0.7)
        reasons = {p.name: p.reason for p in candidate.plugins}
        assert "fell by 30.00 points" in reasons[bad]
        assert asked[:2] == ["assess 0.4", "baseline 0.5"]


def test_one_makes_up_for_the_other_and_nobody_looks_further(bench: Bench) -> None:
    _, asked = several(bench, {"a": -0.3, "b": 0.4})
    assert asked == ["assess 0.6", "baseline 0.5"]
    assert [p.state for p in bench.committed[0][0].plugins] == ["done", "done"]


def test_what_learns_beside_the_model_learns_from_what_is_committed(bench: Bench) -> None:
    _, asked = several(bench, {"a": -0.3, "student": 0.0})
    assert asked == ["assess 0.2", "baseline 0.5", "refine a", "assess 0.2", "refine student"]
    ((candidate, assessed),) = bench.committed
    assert candidate.model == bench.average.model
    assert {p.name: p.state for p in candidate.plugins} == {"a": "skipped", "student": "done"}
    assert assessed.scores["val.accuracy"] == 0.5


def test_the_first_bad_one_holds_the_round_where_the_run_says_so(bench: Bench) -> None:
    outcome, asked = several(bench, {"a": 0.1, "b": -0.3, "c": 0.1}, on_error="hold")
    assert outcome.state == "held"
    assert "strategy b was held in round 1" in outcome.reason
    assert asked[-1] == "assess 0.3"
    assert bench.committed == []
