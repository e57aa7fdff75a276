"""Sets from histograms against sets from the sorted scores of all samples."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protos.plan import StrategyChoice
from strategies import scores
from strategies.calibration.conformal import Conformal
from strategies.context import Calibration
from strategies.stack import Stack
from tests.unit.test_temperature import problem

KINDS = ("lac", "aps", "raps")


def strangeness(logits: Tensor, kind: str) -> Tensor:
    """Scores of all classes, from their definitions."""
    p = logits.double().softmax(1)
    if kind == "lac":
        return 1 - p
    out = torch.empty_like(p)
    for i, row in enumerate(p.tolist()):
        order = sorted(range(len(row)), key=lambda c: -row[c])
        total = 0.0
        for rank, c in enumerate(order, 1):
            total += row[c]
            out[i, c] = total + (0.01 * max(0, rank - 1) if kind == "raps" else 0)
    return out


def fitted(strategy: Conformal, *parts: dict[str, Tensor]) -> Calibration:
    sums = scores.add(*parts) | {"sites": torch.tensor(float(len(parts)))}
    calibration = strategy.calibrate(sums)
    assert calibration is not None
    return calibration


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), sites=st.integers(1, 5), alpha=st.sampled_from([0.05, 0.1, 0.3]))
def test_the_quantile_is_that_of_the_pooled_scores(
    kind: str, seed: int, sites: int, alpha: float
) -> None:
    logits, targets = problem(seed, 240, 5, 3.0, 1.5)
    strategy = Conformal(alpha=alpha, score=kind)
    parts = [strategy.evaluate(logits[k::sites], targets[k::sites]) for k in range(sites)]
    found = fitted(strategy, *parts)
    own = strangeness(logits, kind)[torch.arange(240), targets].sort().values
    exact = float(own[math.ceil((240 + sites) * (1 - alpha) - 1e-9) - 1])
    quantile = found.parameters["quantile"]
    assert quantile >= exact - 1e-9
    # Not more than a cell above: few samples lie between the two.
    width = 0.05 if kind == "lac" else 0.04 * max(abs(exact - 1), abs(quantile - 1)) + 1e-6
    assert quantile - exact <= width
    rated = strategy.rate(scores.add(*parts), found.parameters)
    assert rated["coverage"] == pytest.approx(float((own <= quantile).double().mean()), abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_coverage_and_size_are_those_of_the_sets(kind: str) -> None:
    logits, targets = problem(3, 2000, 6, 4.0, 2.0)
    strategy = Conformal(score=kind)
    found = fitted(strategy, strategy.evaluate(logits[:1000], targets[:1000]))
    sets = strategy.sets(logits[1000:], found.parameters)
    own = sets[torch.arange(1000), targets[1000:]]
    rated = strategy.rate(strategy.evaluate(logits[1000:], targets[1000:]), found.parameters)
    assert rated["coverage"] == pytest.approx(float(own.double().mean()), abs=1e-12)
    assert rated["set_size"] == pytest.approx(float(sets.sum(1).double().mean()), abs=1e-12)
    assert rated["coverage"] == pytest.approx(0.9, abs=0.03)
    assert torch.equal(sets, strangeness(logits[1000:], kind) <= found.parameters["quantile"])


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("kind", KINDS)
def test_coverage_over_twenty_splits(kind: str, scale: float) -> None:
    """Also where scores pile up at one end: a model that is hardly ever unsure, and one that always is."""
    logits, targets = problem(9, 3000, 10, scale, 1.0)
    strategy = Conformal(score=kind)
    found = []
    for split in range(20):
        order = torch.randperm(3000, generator=torch.Generator().manual_seed(split))
        val, test = order[:1000], order[1000:]
        parts = [strategy.evaluate(logits[val[k::5]], targets[val[k::5]]) for k in range(5)]
        calibration = fitted(strategy, *parts)
        rated = strategy.rate(
            strategy.evaluate(logits[test], targets[test]), calibration.parameters
        )
        found.append(rated["coverage"])
    mean = sum(found) / 20
    # A model that is never unsure names the right class oftener than asked, whatever the set.
    assert 0.895 <= mean <= (0.91 if scale == 1 or kind != "raps" else 0.99)


def test_too_few_samples_promise_every_class() -> None:
    strategy = Conformal(alpha=0.1)
    logits, targets = problem(0, 5, 4, 2.0, 1.0)
    found = fitted(strategy, strategy.evaluate(logits, targets))
    assert found.parameters["quantile"] is None
    assert strategy.sets(logits, found.parameters).all()


def test_the_rank_counts_the_sites() -> None:
    """100 samples, alpha 0.1: the 91st score with one site, the 95th with five."""
    logits = torch.stack([torch.linspace(-3, 3, 100), torch.zeros(100)], dim=1)
    targets = torch.zeros(100, dtype=torch.long)
    own = strangeness(logits, "lac")[:, 0].sort().values
    for sites, rank in ((1, 91), (5, 95)):
        parts = [Conformal().evaluate(logits[k::sites], targets[k::sites]) for k in range(sites)]
        quantile = fitted(Conformal(), *parts).parameters["quantile"]
        assert float(own[rank - 1]) <= quantile < float(own[rank])


def test_sets_are_made_of_what_the_temperature_gives() -> None:
    choices = [StrategyChoice(name="conformal"), StrategyChoice(name="temperature")]
    stack = Stack(choices)
    logits, targets = problem(2, 400, 4, 8.0, 4.0)
    assert {name.split("/")[0] for name in stack.evaluate(logits, targets)} == {"temperature"}
    maps = {n: c.parameters for n, c in stack.calibrate(stack.evaluate(logits, targets)).items()}
    after = stack.transform(logits, maps)
    seen = stack.observe(after, targets, "val")
    assert {name.split("/")[0] for name in seen} == {"conformal"}
    settled = {n: c.parameters for n, c in stack.settle(seen, 1).items()}
    own = strangeness(after, "lac")[torch.arange(400), targets].sort().values
    exact = float(own[math.ceil(401 * 0.9) - 1])
    assert settled["conformal"]["quantile"] == pytest.approx(exact, abs=0.05)
    assert stack.rate(seen, settled).keys() == {"val.coverage", "val.set_size"}
    assert torch.equal(stack.transform(logits, maps | settled), after)


def test_small_on_the_wire_whatever_the_classes() -> None:
    sums = Conformal().evaluate(torch.randn(4, 1000), torch.arange(4))
    assert sum(v.numel() * v.element_size() for v in sums.values()) < 8100
