"""What `gc` keeps: never less than a run needs to go on, to be understood, or to be exported."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.config import RetentionSection
from orchestrator.ledger import PlanRow, RoundRow
from orchestrator.retention import collect, needed
from orchestrator.run_config import parse_run
from protos.manifest import Manifest
from tests.support.workbench import Workbench, of_spec

SMALL = Manifest((of_spec("w", (2,)),))
RUN = 'name = "child"\nrounds = 1\ninit = { from = "r@1" }\ntask = { name = "t" }'
TIGHT = RetentionSection(models=0, contributions=0)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(tmp_path, config="[retention]\nmodels = 0\ncontributions = 0")
    bench.enrol("north")
    bench.run("r", rounds=9)
    yield bench
    bench.close()


def model(bench: Workbench, value: float) -> str:
    return bench.put_model(SMALL, {"w": torch.tensor([value, 0.0])})


def history(bench: Workbench, accuracies: list[float], run: str = "r") -> list[str]:
    """Commit rounds 0, 1, …; gives their models."""
    out = []
    for number, accuracy in enumerate(accuracies):
        scores = {"val.accuracy": accuracy} if number else {}
        row = bench.commit(run, number, summary={"scores": scores})
        out.append(row.model)
    return out


def kept(bench: Workbench, retention: RetentionSection = TIGHT, run: str = "r") -> set[str]:
    return needed(bench.engine, bench.ledger.run(run), retention)


def contributed(bench: Workbench, number: int, attempt: int = 1) -> str:
    """Plan a round and count a contribution to it; gives the digest of its payload."""
    row = bench.contribution(
        "north", SMALL, {"w": torch.tensor([float(number), float(attempt)])},
        run="r", round=number, attempt=attempt,
    )  # fmt: skip
    plan = PlanRow("r", number, attempt, "train", "north", b"plan", row.work_digest)
    bench.ledger.plan_round(RoundRow("r", number, attempt), [plan])
    assert bench.ledger.accept(row).verdict == "counted"
    return row.index


def committed_with_contribution(bench: Workbench, number: int) -> str:
    index = contributed(bench, number)
    bench.ledger.close_round("r", number, 1, None, "x")
    bench.ledger.commit_round("r", number, 1, model=model(bench, number))
    return index


def test_first_newest_and_best_always_stay(bench: Workbench) -> None:
    models = history(bench, [0, 0.25, 0.75, 0.5, 0.5])
    assert kept(bench) == {models[0], models[2], models[4]}


@pytest.mark.parametrize(
    ("n", "rounds"),
    [
        (0, {0, 1, 4}),
        (1, {0, 1, 4}),
        (2, {0, 1, 3, 4}),
        (99, {0, 1, 2, 3, 4}),
        ("all", {0, 1, 2, 3, 4}),
    ],
)
def test_the_last_n_models_stay(bench: Workbench, n: Any, rounds: set[int]) -> None:
    models = history(bench, [0, 0.75, 0.5, 0.5, 0.5])
    found = kept(bench, RetentionSection(models=n, contributions=0))
    assert found == {models[k] for k in rounds}


def test_all_parts_of_a_model_stay_together(bench: Workbench) -> None:
    parts = [model(bench, value) for value in (1.0, 2.0, 3.0)]
    summary = {"frozen": parts[1], "orchestrator": parts[2]}
    bench.commit("r", 0, parts[0], summary=summary)
    assert kept(bench) == set(parts)


def test_what_the_next_round_reads_stays(bench: Workbench) -> None:
    state, merged = model(bench, 5.0), bench.store.put_bytes(b"merged")
    bench.commit("r", 0)
    bench.commit("r", 1, outer_state=model(bench, 4.0))
    last = bench.commit(
        "r", 2, outer_state=state, summary={"payloads": {"s/x": {"object": merged}}}
    )
    found = kept(bench)
    assert {state, merged, last.model} <= found
    assert model(bench, 4.0) not in found


def test_what_strategies_keep_stays_with_its_model(bench: Workbench) -> None:
    old, new = (bench.store.put_bytes(data) for data in (b"old", b"new"))
    bench.commit("r", 0)
    bench.commit("r", 1, summary={"files": {"student/a": {"object": old, "nbytes": 3}}})
    bench.commit("r", 2, summary={"files": {"student/a": {"object": new, "nbytes": 3}}})
    assert {old, new} & kept(bench) == {new}
    assert {old, new} <= kept(bench, RetentionSection(models="all", contributions=0))


@pytest.mark.parametrize(("n", "rounds"), [(0, set()), (1, {3}), (2, {2, 3}), ("all", {1, 2, 3})])
def test_the_last_n_rounds_keep_their_contributions(
    bench: Workbench, n: Any, rounds: set[int]
) -> None:
    bench.commit("r", 0)
    sent = {k: committed_with_contribution(bench, k) for k in (1, 2, 3)}
    found = kept(bench, RetentionSection(models="all", contributions=n))
    assert found & set(sent.values()) == {sent[k] for k in rounds}


def test_an_open_round_keeps_its_base_its_candidate_and_what_came(bench: Workbench) -> None:
    (base,) = history(bench, [0])
    sent = contributed(bench, 1)
    assert {base, sent} <= kept(bench)
    candidate, state = model(bench, 7.0), model(bench, 8.0)
    bench.ledger.close_round("r", 1, 1, None, "x")
    bench.ledger.hold_round("r", 1, 1, "feddf failed", model=candidate, outer_state=state)
    assert {base, sent, candidate, state} <= kept(bench)


def test_finished_work_of_abandoned_attempts_stays_until_the_round_is_committed(
    bench: Workbench,
) -> None:
    history(bench, [0])
    sent = contributed(bench, 1)
    bench.ledger.abandon_round("r", 1, 1, "below quorum")
    assert sent in kept(bench)
    bench.commit("r", 1, attempt=2)
    assert sent not in kept(bench)


def test_a_start_file_stays(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    name = bench.store.put_bytes(b"weights")
    bench.run("f", init=f'{{ from = "m.safetensors", digest = "{name}" }}')
    assert kept(bench, run="f") == {name}
    bench.close()


def test_what_a_queued_run_starts_from_stays(bench: Workbench) -> None:
    """It may wait for days behind other runs, and its parent goes on meanwhile."""
    frozen = model(bench, 9.0)
    bench.commit("r", 0)
    parent = bench.commit("r", 1, summary={"frozen": frozen})
    for number in (2, 3):
        bench.commit("r", number, summary={"scores": {"val.accuracy": number / 4}})
    assert parent.model not in kept(bench)
    bench.ledger.create_run(replace(bench.run_row(parse_run(RUN), "child"), parent=("r", 1)))
    assert {parent.model, frozen} <= kept(bench, run="child")


def test_collect_removes_the_rest(bench: Workbench) -> None:
    models = history(bench, [0, 0.25, 0.75, 0.5, 0.5])
    for path in bench.home.store.rglob("*"):
        if path.is_file():
            os.utime(path, (1.0, 1.0))  # older than the time that new files are spared for
    planned = collect(bench.engine, dry_run=True)
    assert planned.dry_run
    assert set(planned.names) == {models[1], models[3]}
    assert all(name in bench.store for name in models)
    done = collect(bench.engine, dry_run=False)
    assert done.bytes == planned.bytes > 0
    assert [name in bench.store for name in models] == [True, False, True, False, True]
    # The manifest of what stays can still be read.
    assert bench.tensors(models[0])["w"].shape == (2,)
    assert collect(bench.engine, dry_run=False).names == ()


def test_nothing_of_another_run_goes(bench: Workbench) -> None:
    bench.run("s")
    mine, theirs = history(bench, [0, 0.5]), history(bench, [0, 0.5], "s")
    for path in bench.home.store.rglob("*"):
        if path.is_file():
            os.utime(path, (1.0, 1.0))
    assert collect(bench.engine, dry_run=False).names == ()
    assert all(name in bench.store for name in [*mine, *theirs])
