"""The gate: which rounds are held, and what is said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.rounds.engine import Assessment, Candidate, Model, Planned
from orchestrator.rounds.gate import hold_reason
from orchestrator.rounds.gather import Closed
from orchestrator.rounds.passes import cosines
from orchestrator.rounds.reduce import reduce
from orchestrator.run_config import GateSection, parse_run
from protos.errors import ConfigInvalid
from protos.manifest import Manifest
from tests.support.workbench import RUN_FILE, Workbench, of_spec

ONE = Manifest((of_spec("w", (4,)),))


class Round:
    """A round of a run with history: what its gate says."""

    def __init__(self, tmp_path: Path) -> None:
        self.bench = Workbench(tmp_path)
        self.base = self.bench.put_model(ONE, {"w": torch.ones(4)})
        self.row = self.bench.run()
        self.bench.commit("r", 0)

    def planned(self, **gate: Any) -> Planned:
        planned = self.bench.planned(self.base)
        config = planned.config.model_copy(update={"gate": GateSection(**gate)})
        before = self.bench.ledger.last_committed("r")
        assert before is not None
        return replace(planned, config=config, run=self.row, before=before)

    def contributions(self, **updates: list[float]) -> Closed:
        rows = []
        for site, values in updates.items():
            row = self.bench.contribution(site, ONE, {"w": torch.tensor(values)}, base=self.base)
            rows.append(replace(row, norm=math.hypot(*values)))
        return self.bench.closed(rows)

    def reason(
        self,
        planned: Planned,
        closed: Closed,
        scores: Mapping[str, float] | None = None,
        by_site: Mapping[str, float] | None = None,
    ) -> str:
        candidate = Candidate(Model("m"), "", 0.1, {}, {}, cosines=dict(by_site or {}))
        assessed = Assessment(scores is not None, dict(scores or {}))
        return hold_reason(self.bench.engine, planned, closed, candidate, assessed)


@pytest.fixture
def round(tmp_path: Path) -> Any:
    made = Round(tmp_path)
    yield made
    made.bench.close()


def test_nothing_is_held_unless_the_run_asks_for_it(round: Round) -> None:
    closed = round.contributions(a=[1, 0, 0, 0], b=[1, 0, 0, 0], c=[-1e9, 0, 0, 0])
    assert round.reason(round.planned(), closed, {"val.accuracy": 0.0}) == ""


def test_a_norm_far_above_the_cohorts_is_named(round: Round) -> None:
    planned = round.planned(norm=3)
    three = {"a": [1.0, 0, 0, 0], "b": [2.0, 0, 0, 0]}
    assert round.reason(planned, round.contributions(**three, c=[6.0, 0, 0, 0])) == ""
    assert round.reason(planned, round.contributions(**three, c=[6.5, 0, 0, 0])) == (
        "site c: the norm of its update is 6.5, more than 3 times the cohort's median of 2"
    )
    two = round.contributions(a=[1.0, 0, 0, 0], c=[9.0, 0, 0, 0])
    assert round.reason(planned, two) == "", "of two nobody knows which"


def test_an_update_against_the_others_is_named(round: Round) -> None:
    """By the reduction itself, over real bytes."""
    planned = round.planned(cosine=0.0)
    closed = round.contributions(
        a=[1.0, 1, 0, 0], b=[1.0, 0.5, 0, 0], c=[-2.0, -1, 0.1, 0], d=[0.5, 1, 0, 0]
    )
    found = reduce(round.bench.engine, planned, closed).cosines
    others = torch.tensor([2.5, 2.5, 0, 0]), torch.tensor([-2.0, -1, 0.1, 0])
    expected = torch.nn.functional.cosine_similarity(*others, dim=0)
    assert found["c"] == pytest.approx(float(expected), abs=1e-6)
    assert sorted(found) == ["a", "b", "c", "d"]
    said = round.reason(planned, closed, by_site=found)
    assert said.startswith("site c: its update has a cosine of -0.948 to the sum of the others'")
    assert "site a" not in said
    assert reduce(round.bench.engine, round.planned(), closed).cosines == {}


def test_cosines_from_a_gram_matrix() -> None:
    rows = np.random.default_rng(5).normal(size=(5, 7))
    rows[3] = 0
    found = cosines((rows @ rows.T).tolist())
    for i, cosine in enumerate(found):
        others = rows.sum(0) - rows[i]
        size = np.linalg.norm(rows[i]) * np.linalg.norm(others)
        assert cosine == pytest.approx(rows[i] @ others / size if size else 0.0)


def test_a_model_is_judged_by_the_last_one_that_was_assessed(round: Round) -> None:
    planned, closed = round.planned(tolerance=0.02), Closed(())
    assert round.reason(planned, closed, {"val.accuracy": 0.1}) == "", "the first one there is"
    round.bench.commit("r", 1, summary={"scores": {"val.accuracy": 0.8}})
    round.bench.commit("r", 2, summary={"scores": {}})
    planned = round.planned(tolerance=0.02)
    assert planned.before.round == 2
    assert round.reason(planned, closed, {"val.accuracy": 0.781}) == ""
    assert "fell by 3.00 points, from 80.00 % to 77.00 %" in round.reason(
        planned, closed, {"val.accuracy": 0.77}
    )
    assert round.reason(planned, closed) == "", "unassessed"
    assert round.reason(planned, closed, {"test.accuracy": 0.1}) == "", "test data only report"


def test_the_orchestrators_holdout_judges_too(round: Round) -> None:
    scores = {"val.accuracy": 0.8, "holdout.accuracy": 0.7, "holdout_test.accuracy": 0.9}
    round.bench.commit("r", 1, summary={"scores": scores})
    planned, closed = round.planned(tolerance=0.02), round.contributions(a=[1, 0, 0, 0])
    good = {"val.accuracy": 0.8, "holdout.accuracy": 0.69, "holdout_test.accuracy": 0.1}
    assert round.reason(planned, closed, good) == ""
    assert round.reason(planned, closed, good | {"holdout.accuracy": 0.6}) == (
        "holdout accuracy fell by 10.00 points, from 70.00 % to 60.00 %; 2 are tolerated"
    )
    both = good | {"holdout.accuracy": 0.6, "val.accuracy": 0.5}
    assert round.reason(planned, closed, both).count(" fell by ") == 2
    assert round.reason(planned, closed, {"holdout.accuracy": 0.6}) != "", "no site assessed it"


def test_a_holdout_that_is_never_asked_is_refused() -> None:
    text = RUN_FILE.format(name="r", rounds=1)
    with pytest.raises(ConfigInvalid, match=r"assess\.holdout needs assessed rounds"):
        parse_run(text + "[assess]\nevery = 0\nholdout = true\n")


def test_a_gate_that_can_never_judge_is_refused() -> None:
    text = RUN_FILE.format(name="r", rounds=1)
    with pytest.raises(ConfigInvalid, match=r"gate\.tolerance needs assessed rounds"):
        parse_run(text + "[assess]\nevery = 0\n[gate]\ntolerance = 0.1\n")
    assert parse_run(text + "[gate]\nnorm = 5\n").gate.on_hold == "reject"
