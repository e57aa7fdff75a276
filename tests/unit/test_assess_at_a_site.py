"""What a site answers when it is asked to assess, without processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from protos.plan import Plan, StrategyChoice
from site_agent.trainer import assessing
from site_agent.trainer.site_state import SiteState
from strategies import registry
from strategies.stack import Stack
from tests.support import site_tasks
from tests.support.sites import base_of, plan_of, workload_of
from tests.support.trainer_bench import EVERY, Bench


@pytest.fixture(autouse=True)
def more_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "catalogue", lambda: EVERY)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_assess_sums_equal_those_of_the_whole_set(bench: Bench) -> None:
    plan = plan_of(kind="assess")
    header, sums, out = bench.perform(plan)
    data = site_tasks.clouds(101, 30)
    model = workload_of(plan).model.eval()
    with torch.no_grad():
        outputs = model(data.tensors[0])
    right = (outputs.argmax(1) == data.tensors[1]).sum()
    assert float(sums["val/correct"]) == float(right)
    assert float(sums["val/nll"]) == pytest.approx(
        float(F.cross_entropy(outputs, data.tensors[1], reduction="sum")), rel=1e-6
    )
    assert header.examples == 30
    assert all(p.merge == "sum" for p in header.payloads)
    assert [path.name for path in out.iterdir()] == ["payload"]


def test_assess_and_reassess_of_a_calibration(bench: Bench) -> None:
    stack = (StrategyChoice(name="temperature"),)
    header, sums, _ = bench.perform(plan_of(kind="assess", stack=stack))
    assert any(name.startswith("temperature/") for name in header.payload_names)
    maps = {name: c.parameters for name, c in Stack(stack).calibrate(sums).items()}
    assert maps
    plan = plan_of(kind="reassess", stack=stack, calibration=maps)
    again, later, _ = bench.perform(plan)
    assert not any(name.startswith("temperature/") for name in again.payload_names)
    assert float(later["val_calibrated/n"]) == 30
    assert float(later["val_calibrated/correct"]) == float(sums["val/correct"])


def test_the_second_exchange_does_not_run_the_model_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack = (StrategyChoice(name="temperature"),)
    first = plan_of(kind="assess", stack=stack)
    again = plan_of(kind="reassess", stack=stack, calibration={"temperature": {"temperature": 2.0}})
    work, ran = workload_of(first), []
    forward = work.task.forward

    def counted(*arguments: Any) -> Any:
        ran.append(1)
        return forward(*arguments)

    monkeypatch.setattr(work.task, "forward", counted, raising=False)

    def runs(plan: Plan) -> tuple[int, dict[str, Tensor]]:
        ran.clear()
        _, sums, _ = bench.perform(plan, work=work)
        return len(ran), sums

    there, fresh = runs(again)
    assert there > 0
    assert runs(first)[0] == there
    none, kept = runs(again)
    assert none == 0
    assert kept.keys() == fresh.keys()
    assert all(torch.equal(kept[name], fresh[name]) for name in fresh)
    # Nor does it read the model: it may be larger than all else that an assessment needs.
    runs(first)
    _, manifest, index = base_of(bench.folder, first)
    _, unread, _ = bench.perform(again, work=work, base=(bench.folder / "none", manifest, index))
    assert all(torch.equal(unread[name], fresh[name]) for name in fresh)
    # Asked once more, as after a break; for another model; or if its outputs are too large to keep.
    assert runs(again)[0] == there
    runs(first)
    assert runs(again.model_copy(update={"base": "0" * 64}))[0] == there
    runs(first.model_copy(update={"round": 2}))
    assert {key[1] for key in work.outputs} == {2}
    monkeypatch.setattr(assessing, "KEPT_BYTES", 10)
    runs(first)
    assert not work.outputs
    assert runs(again)[0] == there


def test_an_assessment_reads_of_a_site_s_memory_its_own_tensors_only(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SiteState, "read", lambda _: pytest.fail("it may be twice the model"))
    bench.perform(plan_of(kind="assess"), state=bench.folder)
    with pytest.raises(pytest.fail.Exception):
        bench.perform(plan_of(), state=bench.folder)


def test_a_site_s_own_tensors_are_assessed_with_the_candidate(bench: Bench) -> None:
    stack = ("test_own_normalisation",)
    _, _, state = bench.perform(plan_of(stack=stack))
    plan = plan_of(stack=stack, kind="assess")
    _, remembered, _ = bench.perform(plan, state=state)
    _, fresh, _ = bench.perform(plan)
    assert not torch.equal(remembered["val/nll"], fresh["val/nll"])


def test_what_looks_behind_the_map_is_asked_for_once(bench: Bench) -> None:
    sets, temperature = StrategyChoice(name="conformal"), StrategyChoice(name="temperature")
    names = {"conformal/val/own", "conformal/val/every", "conformal/test/own"}
    for stack, kind in (((sets,), "assess"), ((sets, temperature), "reassess")):
        asked = {"assess": "reassess", "reassess": "assess"}[kind]
        _, sums, _ = bench.perform(plan_of(kind=kind, stack=stack))
        assert names <= sums.keys()
        assert int(sums["conformal/val/own"].sum()) == 30
        if len(stack) > 1:
            _, other, _ = bench.perform(plan_of(kind=asked, stack=stack))
            assert not names & other.keys()
