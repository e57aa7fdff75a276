"""A round from top to bottom: where it may be interrupted, nothing of it is committed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.compute.errors import ComputeTimedOut
from orchestrator.exchange import Gathered
from orchestrator.gathering import Decision
from orchestrator.rounds import assess as assess_module
from orchestrator.rounds import page as page_module
from orchestrator.rounds.assess import assess
from orchestrator.rounds.engine import Candidate, Model, Planned
from orchestrator.rounds.gather import Closed
from orchestrator.rounds.page import run_round
from protos.manifest import Manifest
from tests.support.workbench import Workbench, of_spec

INTERRUPTED = Gathered(Decision("wait"), (), {"north": "gone"}, interrupted=True)
ABANDONED = Gathered(Decision("abandon", "below the quorum"), (), {"north": "gone"})
CLOSED = Gathered(Decision("close", "every site answered"), ("north",), {})


class Bench:
    """A planned round whose steps give what a test says."""

    def __init__(self, work: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.work, self.set = work, monkeypatch.setattr
        work.enrol("north")
        self.run = work.run("r")
        manifest = Manifest((of_spec("w", (2,)),))
        base = work.put_model(manifest, {"w": torch.zeros(2)})
        work.commit("r", 0, base)
        planned = work.planned(base)
        draft = {**planned.row.draft, "cohort": ["north"]}
        self.planned: Planned = replace(
            planned, row=replace(planned.row, draft=draft), run=self.run
        )
        self.candidate = Candidate(Model(base), "", 0.5, {"north": 1.0}, {})
        for step, gives in (
            ("plan", self.planned),
            ("gather", Closed(())),
            ("reduce", self.candidate),
            ("refine", self.candidate),
        ):
            self.gives(step, gives)
        self.committed: list[Any] = []
        self.candidates: list[Any] = []

        def commit(*steps: Any) -> None:
            self.candidates.append(steps[-2])
            self.committed.append(steps[-1])

        self.set(page_module, "commit", commit)

    def gives(self, step: str, value: Any) -> None:
        """Let a step of the round give a value."""
        self.set(page_module, step, lambda *_: value)

    def exchanges(self, *results: Gathered) -> None:
        """Let the exchanges of the assessment end so."""
        found = iter(results)
        self.set(assess_module, "_exchange", lambda *_: next(found))

    def evaluates(self, calibration: dict[str, Any], failed: dict[str, str] | None = None) -> None:
        """Let the sums of the sites come to something."""
        value: dict[str, Any] = {
            "scores": {"val.accuracy": 0.5},
            "sites": {"north": {"val.accuracy": 0.5}},
            "reliability": {},
            "calibration": calibration,
            "settled": {},
            "awaited": False,
            "failed": failed or {},
            "reports": {},
        }
        self.set(assess_module, "evaluate", lambda *_: value)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    work = Workbench(tmp_path)
    yield Bench(work, monkeypatch)
    work.close()


def go(bench: Bench) -> Any:
    return run_round(bench.work.engine, bench.run, 1)


def test_an_interrupted_gathering_is_no_failed_attempt(bench: Bench) -> None:
    bench.gives("gather", INTERRUPTED)
    assert go(bench).state == "interrupted"
    bench.gives("gather", ABANDONED)
    assert (go(bench).state, go(bench).reason) == ("again", "below the quorum")
    assert bench.committed == []


def test_an_interrupted_assessment_commits_nothing(bench: Bench) -> None:
    """The daemon was told to end: the next one reduces again, to the same bits, and asks again."""
    bench.exchanges(INTERRUPTED)
    assert go(bench).state == "interrupted"
    bench.evaluates({"temperature": {"t": 2.0}})
    bench.exchanges(CLOSED, INTERRUPTED)
    assert go(bench).state == "interrupted"
    assert bench.committed == []


def test_an_assessment_below_the_quorum_is_committed_as_unassessed(bench: Bench) -> None:
    bench.exchanges(ABANDONED)
    assert go(bench).state == "committed"
    (assessed,) = bench.committed
    assert not assessed.done
    assert assessed.missing == {"north": "gone"}


@pytest.mark.parametrize(("on_error", "state"), [("skip", "committed"), ("hold", "held")])
def test_a_map_that_could_not_be_fitted_is_left_out_or_holds_the_round(
    bench: Bench, on_error: str, state: str
) -> None:
    config = bench.planned.config.model_copy(update={"on_error": on_error})
    bench.gives("plan", replace(bench.planned, config=config))
    bench.evaluates({}, {"temperature": "ran longer than its 2 s"})
    bench.exchanges(CLOSED)
    bench.set(bench.work.ledger, "hold_round", lambda *_, **more: None)
    bench.set(page_module, "summary", lambda *steps: bench.candidates.append(steps[3]))
    outcome = go(bench)
    assert outcome.state == state
    word = "held" if state == "held" else "skipped"
    said = f"strategy temperature was {word} in round 1: ran longer than its 2 s"
    assert said in bench.work.notes
    assert outcome.reason == (said if state == "held" else "")
    (candidate,) = bench.candidates
    assert [(p.name, p.state) for p in candidate.plugins] == [("temperature", word)]


def test_an_assessed_round(bench: Bench) -> None:
    bench.evaluates({})
    bench.exchanges(CLOSED)
    assert go(bench).state == "committed"
    (assessed,) = bench.committed
    assert assessed.done
    assert assessed.scores == {"val.accuracy": 0.5}


@pytest.mark.parametrize(
    ("every", "number", "asked"), [(0, 1, False), (1, 1, True), (2, 1, False), (2, 2, True), (2, 3, True)]
)  # fmt: skip
def test_every_nth_round_and_the_last_one_are_assessed(
    bench: Bench, every: int, number: int, asked: bool
) -> None:
    """Of three."""
    section = bench.planned.config.assess.model_copy(update={"every": every})
    planned = replace(
        bench.planned,
        row=replace(bench.planned.row, round=number),
        config=bench.planned.config.model_copy(update={"assess": section}),
    )
    exchanged = []
    bench.set(assess_module, "_exchange", lambda *_: exchanged.append(1) or ABANDONED)
    assert assess(bench.work.engine, planned, Closed(()), bench.candidate) is not None
    assert bool(exchanged) == asked


def test_code_that_never_comes_back_ends_with_its_worker_and_is_not_asked_again(
    bench: Bench,
) -> None:
    stack = [{"name": name, "params": {}, "rounds": None} for name in ("fedprox", "temperature")]
    row = replace(bench.planned.row, draft={**bench.planned.row.draft, "stack": stack})
    asked: list[list[str]] = []

    def ask(function: str, args: dict[str, Any], seconds: float) -> dict[str, Any]:
        assert function == "assess"
        assert seconds > args["seconds"]
        asked.append(args.get("without", []))
        if len(asked) == 1:
            raise ComputeTimedOut("not done after 1860 s: 1 tasks, now cancelled")
        return {"scores": {"val.accuracy": 0.5}, "failed": {}}

    engine = bench.work.engine
    engine.stack_facts(stack)
    bench.set(engine, "ask", ask)
    found = assess_module.evaluate(engine, replace(bench.planned, row=row), "assess", True)
    assert asked == [[], ["temperature"]]
    assert found["scores"] == {"val.accuracy": 0.5}
    assert found["failed"] == {"temperature": "not done after 1860 s: 1 tasks, now cancelled"}
