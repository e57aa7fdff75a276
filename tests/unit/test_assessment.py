"""What the orchestrator makes of the sites' sums, exchange by exchange."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.arithmetic.assessment import assess
from protos.plan import StrategyChoice
from protos.tensors import view_bytes
from strategies import registry, scores
from strategies.stack import Stack
from tests.support.wayward import Wayward
from tests.unit.test_temperature import problem

SITES = ("east", "north", "south")
MAP, SETS = StrategyChoice(name="temperature"), StrategyChoice(name="conformal")


def answer(folder: Path, site: str, sums: dict[str, Tensor]) -> dict[str, Any]:
    """A site's payloads, as they lie in the store."""
    path, at, specs = folder / f"{site}.data", 0, {}
    with path.open("wb") as file:
        for name, tensor in sums.items():
            data = view_bytes(tensor)
            file.write(data)
            dtype = str(tensor.dtype).removeprefix("torch.")
            specs[name] = {
                "path": str(path), "offset": at, "nbytes": len(data), "dtype": dtype,
                "shape": list(tensor.shape), "merge": "sum",
            }  # fmt: skip
            at += len(data)
    return {"site": site, "examples": 1, "payloads": specs}


def data_of(k: int) -> tuple[Tensor, Tensor]:
    """Logits and classes of a site; the third is the odd one out."""
    return problem(k, 200 + 100 * k, 5, 8.0, 4.0 if k < 2 else 12.0)


def sums_of(stack: Stack, k: int, maps: dict[str, Any], second: bool) -> dict[str, Tensor]:
    outputs, targets = data_of(k)
    outputs = stack.transform(outputs, maps)
    tail = "_calibrated" if second else ""
    out = {}
    for split, rows in (("val", slice(0, None, 2)), ("test", slice(1, None, 2))):
        z, y = outputs[rows], targets[rows]
        own = scores.narrowed(scores.sums(z, y))
        out |= {f"{split}{tail}/{name}": value for name, value in own.items()}
        if second or not stack.mapping:
            out |= stack.observe(z, y, split)
        if split == "val" and not second:
            out |= stack.evaluate(z, y)
    return out


def exchange(
    folder: Path,
    choices: tuple[StrategyChoice, ...],
    maps: dict[str, Any],
    second: bool,
    **more: Any,
) -> dict[str, Any]:
    stack = Stack(choices)
    rows = [answer(folder, s, sums_of(stack, k, maps, second)) for k, s in enumerate(SITES)]
    args = {"stack": [c.model_dump(mode="json") for c in choices], "sites": rows}
    bounds = {"seconds": 60.0, "memory_bytes": 1 << 30}
    return assess({**args, **bounds, "calibrate": not second, **more})


def test_sets_are_settled_behind_the_map_and_measured_per_site(tmp_path: Path) -> None:
    first = exchange(tmp_path, (SETS, MAP), {}, False)
    assert first["awaited"]
    assert first["calibration"].keys() == {"temperature"}
    assert first["settled"] == {}
    assert "test.coverage" not in first["scores"]
    second = exchange(tmp_path, (SETS, MAP), first["calibration"], True)
    assert not second["awaited"]
    assert second["calibration"] == {}
    found = second["settled"]["conformal"]
    assert second["reports"]["conformal"]["sites"] == 3
    assert second["scores"]["test.coverage"] == pytest.approx(0.9, abs=0.05)

    stack = Stack((MAP,))
    for k, site in enumerate(SITES):
        outputs, targets = data_of(k)
        z = stack.transform(outputs, first["calibration"])[1::2]
        strangeness = 1 - z.double().softmax(1)
        inside = strangeness <= found["quantile"]
        covered = inside.gather(1, targets[1::2, None]).double().mean()
        assert second["sites"][site]["test.coverage"] == pytest.approx(float(covered), abs=1e-12)
        size = inside.sum(1).double().mean()
        assert second["sites"][site]["test.set_size"] == pytest.approx(float(size), abs=1e-12)
    # What holds for the mixture does not hold for the one that differs.
    assert second["sites"]["south"]["test.coverage"] < second["sites"]["east"]["test.coverage"]


def test_without_a_map_sets_need_no_second_exchange(tmp_path: Path) -> None:
    first = exchange(tmp_path, (SETS,), {}, False)
    assert not first["awaited"]
    assert first["calibration"] == {}
    assert first["settled"].keys() == {"conformal"}
    assert {"val.coverage", "test.coverage", "test.set_size"} <= first["scores"].keys()


def test_scores_and_curves_before_and_after(tmp_path: Path) -> None:
    first = exchange(tmp_path, (MAP,), {}, False)
    second = exchange(tmp_path, (MAP,), first["calibration"], True)
    outputs, targets = (torch.cat(x) for x in zip(*(data_of(k) for k in range(3)), strict=True))
    assert len(outputs) == len(targets) == 900
    for score in ("ece", "aece", "classwise_ece", "nll", "brier", "accuracy"):
        assert f"test.{score}" in first["scores"]
        assert f"test_calibrated.{score}" in second["scores"]
        assert f"val.{score}" in first["sites"]["east"]
    assert second["scores"]["test_calibrated.ece"] < first["scores"]["test.ece"]
    assert first["reliability"].keys() == {"val", "test"}
    assert second["reliability"].keys() == {"val_calibrated", "test_calibrated"}
    assert sum(second["reliability"]["test_calibrated"]["count"]) == 450


# -- strategies that misbehave ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "raised ValueError: no root in the bracket (wayward.py:"),
        ("memory", "needed more than its 256 MiB of memory"),
        ("loop", "ran longer than its 0.5 s"),
    ],
)
def test_a_strategy_that_fails_at_its_map_is_named_and_the_others_go_on(
    fault: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = {**registry.catalogue(), Wayward.name: Wayward}
    monkeypatch.setattr(registry, "catalogue", lambda: catalogue)
    wayward = StrategyChoice(name=Wayward.name, params={"fault": fault})
    bounds = {"seconds": 0.5 if fault == "loop" else 60.0, "memory_bytes": 256 << 20}
    before = resource.getrlimit(resource.RLIMIT_DATA)
    found = exchange(tmp_path, (wayward,), {}, second=False, **bounds)
    assert found["failed"].keys() == {Wayward.name}
    assert found["failed"][Wayward.name].startswith(words)
    assert found["calibration"] == {}
    assert found["scores"]["test.accuracy"] > 0
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert not found["awaited"]
    # Sets behind its map are still made, on raw outputs.
    sets = exchange(tmp_path, (wayward, SETS), {}, second=False, **bounds)
    assert sets["failed"].keys() == {Wayward.name}
    assert sets["awaited"]
    sets = exchange(tmp_path, (wayward, SETS), {}, second=True, **bounds)
    assert sets["settled"].keys() == {"conformal"}


def test_who_is_left_out_is_not_asked(tmp_path: Path) -> None:
    found = exchange(tmp_path, (MAP,), {}, second=False, without=["temperature"])
    assert (found["calibration"], found["failed"]) == ({}, {})
