"""What leaves behind the noise, and how much of it there is."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from protos.plan import StrategyChoice
from strategies import scores
from strategies.privacy.count_noise import COUNTED, CountNoise
from strategies.stack import Stack
from tests.unit.test_temperature import problem


def everything(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """All sums that built-in strategies send of some val samples."""
    sums = {f"val/{name}": v for name, v in scores.sums(outputs, targets).items()}
    sums["val/loss"] = sums["val/metric.mine"] = torch.tensor(3.7).double()
    for name in ("temperature", "vector_scaling", "histogram_binning", "isotonic"):
        sums |= Stack([StrategyChoice(name=name)]).evaluate(outputs, targets)
    return sums | Stack([StrategyChoice(name="conformal")]).observe(outputs, targets, "val")


def test_only_counts_leave() -> None:
    sums = everything(*problem(0, 50, 4, 3.0, 1.0))
    left = CountNoise(seed=1).release(sums)
    assert sorted(left) == [
        "conformal/val/n", "conformal/val/own", "histogram_binning/counts", "isotonic/counts",
        "val/bins", "val/correct", "val/n",
    ]  # fmt: skip
    for name, value in left.items():
        assert value.dtype == sums[name].dtype
        assert torch.equal(value.double(), value.double().round()), "a fraction shows through"
    assert float(left["val/n"]) == 50
    assert (left["val/bins"] != sums["val/bins"]).any()


def test_a_sample_changes_no_count_by_more_than_is_said() -> None:
    """One sample replaced, many times over: the bound of the guarantee."""
    for seed in range(40):
        outputs, targets = problem(seed, 6, 4, 5.0, 1.0)
        other, its = problem(seed + 100, 1, 4, 5.0, 1.0)
        a = everything(outputs, targets)
        b = everything(torch.cat([outputs[1:], other]), torch.cat([targets[1:], its]))
        for name in CountNoise(seed=1).release(a):
            plain = name.replace("val/", "")
            assert float((a[name].double() - b[name].double()).abs().sum()) <= COUNTED[plain] + 1e-9


@pytest.mark.parametrize(("noise", "deviation"), [("laplace", 3.5), ("gaussian", 2.5)])
def test_the_noise_has_its_scale(noise: str, deviation: float) -> None:
    zero = {"val/bins": torch.zeros(3, 20_000).double()}
    drawn = CountNoise(scale=2.5, noise=noise, seed=3).release(zero)["val/bins"]
    if noise == "laplace":
        q = math.exp(-1 / 2.5)
        deviation = math.sqrt(2 * q) / (1 - q)
    assert float(drawn.mean()) == pytest.approx(0, abs=0.1)
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.03)


def test_without_a_seed_no_two_releases_are_alike() -> None:
    zero = {"val/bins": torch.zeros(3, 15).double()}
    first, second = (CountNoise().release(zero)["val/bins"] for _ in range(2))
    assert not torch.equal(first, second)


def test_maps_and_sets_are_still_fitted() -> None:
    stack = Stack([StrategyChoice(name=n) for n in ("isotonic", "conformal", "count_noise")])
    parts, seen = [], []
    for k in range(3):
        outputs, targets = problem(k, 3000, 5, 8.0, 4.0)
        parts.append(stack.release(stack.evaluate(outputs, targets)))
        seen.append(stack.release(stack.observe(outputs, targets, "val")))
    maps = {n: c.parameters for n, c in stack.calibrate(scores.add(*parts), 3).items()}
    settled = {n: c.parameters for n, c in stack.settle(scores.add(*seen), 3).items()}
    outputs, targets = problem(9, 3000, 5, 8.0, 4.0)
    before = scores.pool([scores.sums(outputs, targets)])["ece"]
    after = scores.pool([scores.sums(stack.transform(outputs, maps), targets)])["ece"]
    assert after < 0.4 * before
    rated = stack.rate(stack.observe(outputs, targets, "test"), settled)
    assert rated["test.coverage"] == pytest.approx(0.9, abs=0.03)
