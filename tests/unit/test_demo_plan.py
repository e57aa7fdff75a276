"""What the demo compares is comparable."""

from pathlib import Path

import pytest

from orchestrator.demo import plan
from orchestrator.demo.results import Result, mean, result_table
from orchestrator.run_config import parse_run
from orchestrator.toml_text import document


@pytest.fixture(params=["fashion_mnist", "digits"])
def workload(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> plan.Workload:
    present = Path(__file__) if request.param == "fashion_mnist" else Path("/nothing")
    monkeypatch.setattr(plan, "FASHION_MNIST", present)
    chosen = plan.workload(None)
    assert chosen.task == request.param
    return chosen


def test_every_run_is_a_run_file(workload: plan.Workload) -> None:
    arms = [
        workload.run,
        plan.fedavg(workload.run),
        plan.isolated(workload.run, "north", 4.5),
        plan.centralised(workload.run, 4.5),
    ]
    configs = [parse_run(document(arm)) for arm in arms]
    main, averaged, alone, central = configs
    assert len({config.name for config in configs}) == 4
    assert {config.rounds for config in configs} == {main.rounds}
    assert {config.task.model_dump_json() for config in configs} == {main.task.model_dump_json()}
    assert [s.name for s in main.stack] == [
        "co_learning", "self_distillation", "feddf", "temperature",
    ]  # fmt: skip
    assert averaged.local.work.epochs == 1.0
    assert averaged.cohort.sites == main.cohort.sites == plan.SITES
    assert [s.name for s in averaged.stack] == ["temperature"]
    assert alone.cohort.sites == ("north",)
    assert central.cohort.sites == (plan.ALL_DATA,)
    assert alone.local.work.epochs == central.local.work.epochs == 4.5
    assert alone.stack[0].params["factor"] == 1.0  # the epochs are given: none are added


def test_the_subset_is_said(workload: plan.Workload) -> None:
    params = workload.run["task"]["params"]
    if workload.task == "fashion_mnist":
        assert f"{params['subset']:,} of its 60,000" in workload.title
    assert params["proxy"] > 0


def test_sites_have_different_parts(workload: plan.Workload) -> None:
    parts = [
        workload.site(part, 3, threads=1)["tasks"][workload.task]["settings"] for part in range(3)
    ]
    assert [p["part"] for p in parts] == [0, 1, 2]
    assert "settings" not in workload.orchestrator_tasks[workload.task]


def test_the_mean_of_rows() -> None:
    rows = [
        Result("a", 0.5, 1.0, 0.1, 0.05, 18, 100, 2),
        Result("b", 0.7, 2.0, 0.3, 0.15, 18, 300, 4),
    ]
    middle = mean("both", rows)
    assert middle.title == "both"
    assert middle.accuracy == pytest.approx(0.6)
    assert middle.wire_bytes == pytest.approx(200)
    assert result_table([*rows, middle]).row_count == 3
