"""Comparing runs: which are one arm, what an interval is, and what pairing by seed brings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.cli.app import code_of
from orchestrator.comparing import LEVEL, Scored, chosen, compare, estimate, scored
from orchestrator.run_config import parse_run
from orchestrator.views import Run
from protos.errors import InvalidInput, NotFound
from tests.unit.fake_operator import FakeOperator, a_round, a_run, fake_daemon


def run_of(name: str, seed: int, extra: str = "", created: float = 1.0, **changes: Any) -> Run:
    text = (
        f'name = "{name}"\nrounds = 2\nseed = {seed}\n'
        f'task = {{ name = "m5", params = {{ seed = {seed} }} }}\n{extra}'
    )
    config = parse_run(text).resolved
    fields = {"id": f"{name}-{seed}-{created}", "config": config, "created": created, **changes}
    return a_run(name, **fields)


def entry(name: str, seed: int, accuracy: float, extra: str = "", created: float = 1.0) -> Scored:
    return Scored(run_of(name, seed, extra, created), {"test.accuracy": accuracy, "test.nll": 0.5})


DISTIL = '[[strategy]]\nname = "feddf"\nsteps = 7\n'


def test_arms_are_runs_that_differ_in_name_and_seed_only() -> None:
    entries = [entry(f"plain-{s}", s, 0.5 + s / 10) for s in range(3)]
    entries += [entry(f"feddf-seed-{s}", s, 0.6 + s / 10, DISTIL) for s in range(2)]
    plain, feddf = compare(entries).arms
    assert (plain.name, feddf.name) == ("plain", "feddf")
    assert plain.runs == {0: "plain-0", 1: "plain-1", 2: "plain-2"}
    assert plain.differs["strategy"] == ["co_learning"]
    assert feddf.differs["strategy"] == ["feddf"]
    assert feddf.differs["strategy.feddf.params.steps"] == 7
    assert "seed" not in str(feddf.differs)
    assert plain.scores["accuracy"].mean == pytest.approx(0.6)
    assert set(plain.scores) == {"accuracy", "nll"}


def test_differences_are_taken_within_a_seed() -> None:
    """Seeds differ by far more than arms do; the paired difference does not see that."""
    entries = [entry(f"a{s}", s, s / 10) for s in range(8)]
    entries += [entry(f"b{s}", s, s / 10 + 0.01, DISTIL) for s in (9, *range(7, 0, -1))]
    _, b = compare(entries).arms
    difference = b.against["accuracy"]
    assert difference.seeds == 7  # 9 has no partner
    assert difference.mean == pytest.approx(0.01)
    assert difference.low == pytest.approx(0.01)
    assert difference.high == pytest.approx(0.01)
    wide = b.scores["accuracy"]
    assert wide.high is not None
    assert wide.low is not None
    assert wide.high - wide.low > 0.2


def test_of_the_same_work_twice_the_newest_counts() -> None:
    entries = [entry("a", 0, 0.9, created=2.0), entry("a", 0, 0.1, created=1.0)]
    (arm,) = compare(entries).arms
    assert arm.values["accuracy"] == {0: 0.9}
    assert arm.scores["accuracy"].low is None


def test_an_interval_is_the_bootstraps() -> None:
    values = np.random.default_rng(3).normal(5, 2, size=40)
    found = estimate(values.tolist())
    assert found.low is not None
    assert found.high is not None
    # For forty values the percentile bootstrap is close to the normal interval of the mean.
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean - found.low == pytest.approx(half, rel=0.1)
    assert found.high - found.mean == pytest.approx(half, rel=0.1)
    assert estimate(values.tolist()) == found


def test_an_interval_holds_the_mean_as_often_as_the_page_says() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(150):
        found = estimate(generator.normal(size=5).tolist())
        held += found.low is not None and found.high is not None and found.low < 0 < found.high
    assert 0.75 < held / 150 < LEVEL


def test_runs_are_chosen_by_name_id_and_pattern() -> None:
    known = [run_of("a-1", 1), run_of("b-1", 1), run_of("a-2", 2), run_of("a-1", 1, created=5.0)]
    assert [r.created for r in chosen(["a-1"], known)] == [5.0]
    assert [r.name for r in chosen(["b-1", "a-*"], known)] == ["b-1", "a-1", "a-2", "a-1"]
    assert chosen([known[0].id, "a-*"], known)[0] == known[0]
    with pytest.raises(NotFound, match="there is no c-"):
        chosen(["a-*", "c-*"], known)


def test_the_last_assessed_round_stands_for_a_run_or_the_best() -> None:
    rounds = [
        a_round(1, scores={"test.accuracy": 0.9}),
        a_round(2, scores={"test.accuracy": 0.8}),
        a_round(3, scores={}, assessed=False),
        a_round(4, scores={"test.accuracy": 0.1}, state="held"),
    ]
    run = run_of("a", 0, best=1)
    assert scored(run, rounds).scores == {"test.accuracy": 0.8}
    assert scored(run, rounds, best=True).scores == {"test.accuracy": 0.9}
    with pytest.raises(InvalidInput, match="run a: no round of it was assessed"):
        scored(run, rounds[2:])


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOperator]:
    monkeypatch.setenv("FARFLUNG_HOME", str(tmp_path))
    with fake_daemon(tmp_path) as running:
        running.run_views = [run_of(f"plain-{s}", s) for s in (0, 1)]
        running.run_views += [run_of(f"feddf-{s}", s, DISTIL) for s in (0, 1)]
        yield running


@pytest.mark.usefixtures("operator")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(["compare", "plain-*", "feddf-*"]) == 0
    out = capsys.readouterr().out
    assert "75.00 [75.00, 75.00]" in out
    assert "+0.00 [+0.00, +0.00]" in out
    assert "strategy.feddf.params.steps = 7" in out
    assert "too few" in out
    assert code_of(["compare", "plain-*", "feddf-*", "--json"]) == 0
    document: Mapping[str, Any] = json.loads(capsys.readouterr().out)
    assert document["arms"][1]["against"]["accuracy"]["mean"] == 0
    assert document["arms"][0]["runs"] == {"0": "plain-0", "1": "plain-1"}
    assert code_of(["compare", "nothing"]) == 66
