"""A model of more than 2 GB with one tensor of more than 2 GiB, and every dtype and odd shape beside it."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from orchestrator.federation import Federation
from tests.support import large_model
from tests.support.large_model import STEP

SITE = "north"


@pytest.mark.parametrize(
    "elements",
    [
        pytest.param(300_001, id="small"),
        pytest.param(
            550_000_000, id="2.2 GB", marks=[pytest.mark.slow, pytest.mark.timeout(900)]
        ),
    ],
)  # fmt: skip
def test_every_kind_of_tensor_goes_round(elements: int, tmp_path: Path) -> None:
    tasks = {"large": {"source": f"{Path(large_model.__file__)}:Large"}}
    site = {"tasks": tasks, "site": {"device": "cpu"}, "trainer": {"threads": 1}}
    config = {
        "name": "large",
        "rounds": 1,
        "task": {"name": "large", "params": {"elements": elements}},
        "init": {"from": f"site:{SITE}"},
        "cohort": {"sites": [SITE], "quorum": "all", "deadline_s": 800},
        "local": {
            "work": {"steps": 1},
            "batch_size": 1,
            "lr": 1.0,
            "optimizer": {"name": "sgd", "momentum": 0.0},
        },
        "assess": {"every": 0},
        "strategy": [],
    }
    with Federation(tmp_path, sites={SITE: site}, dashboard=False) as federation:
        run = federation.run(config, 800)
        assert run.state == "finished", run.reason
        (file,) = (
            path
            for path in federation.client.export(run.id, "1", tmp_path / "export")
            if path.suffix == ".safetensors"
        )
    with safe_open(file, "pt") as exported:
        found = {name: exported.get_slice(name) for name in exported.keys()}  # noqa: SIM118
        assert found["large"].get_shape() == [elements]
        for start in (0, elements // 2, elements - 5):
            assert (found["large"][start : start + 5] == STEP).all()
        found_rest = {n: exported.get_tensor(n) for n in found if n not in ("large", "tied")}
    assert (found_rest["narrow"] == torch.ones(3, 5, dtype=torch.bfloat16) + STEP).all()
    assert found_rest["scalar"].item() == 2.0 + STEP
    assert found_rest["nothing"].shape == (0, 7)
    for dtype in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float64"):
        mean = found_rest[f"mean_{dtype}"]
        assert mean.dtype == getattr(torch, dtype)
        assert (mean.float() == 2.0).all()
    assert found_rest["steps"].item() == 2**40 + 1
    assert found_rest["small"].tolist() == [2, 3]
    assert found_rest["seen"].tolist() == [True, False, True]
