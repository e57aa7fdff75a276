from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from strategies import scores
from strategies.calibration.temperature import Temperature, minimum, slope_and_value

STRATEGY = Temperature(prior=0, certainty=0)
"""Plain maximum likelihood: what a central fit does without a word about it."""


def problem(seed: int, n: int, classes: int, scale: float, truth: float) -> tuple[Tensor, Tensor]:
    """Logits whose honest temperature is about ``truth``."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, classes, generator=generator)
    p = (logits / truth).softmax(dim=1)
    return logits, torch.multinomial(p, 1, generator=generator).squeeze(1)


def central(logits: Tensor, targets: Tensor) -> float:
    """The temperature of all samples in one place, by L-BFGS on log T."""
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [t], lr=1, max_iter=200, tolerance_grad=1e-14, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits.double() / t.exp(), targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return math.exp(float(t.detach()))


def fitted(strategy: Temperature, parts: list[dict[str, Tensor]]) -> float:
    calibration = strategy.calibrate(scores.add(*parts))
    assert calibration is not None
    return float(calibration.parameters["temperature"])


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32),
    n=st.integers(60, 300),
    classes=st.integers(2, 6),
    scale=st.floats(1, 10),
    truth=st.floats(0.5, 5),
    sites=st.integers(1, 5),
)
def test_any_split_gives_the_temperature_of_the_union(
    seed: int, n: int, classes: int, scale: float, truth: float, sites: int
) -> None:
    logits, targets = problem(seed, n, classes, scale, truth)
    where = torch.randint(0, sites, (n,), generator=torch.Generator().manual_seed(seed))
    parts = [STRATEGY.evaluate(logits[where == k], targets[where == k]) for k in range(sites)]
    found, expected = fitted(STRATEGY, parts), central(logits, targets)
    if 0.06 < expected < 19:
        assert found == pytest.approx(expected, rel=1e-6)
    elif expected <= 0.05 or expected >= 20:
        assert found in (pytest.approx(0.05), pytest.approx(20.0))


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), truth=st.floats(0.85, 1.2), sites=st.integers(1, 5))
def test_the_union_decides_whether_there_is_anything_to_cure(
    seed: int, truth: float, sites: int
) -> None:
    """As one data set would have: a central fit, and the ratio of its likelihoods."""
    quantile = 2.705543454095404  # of chi-squared, one degree of freedom, at 0.9
    logits, targets = problem(seed, 300, 4, 4.0, truth)
    where = torch.randint(0, sites, (300,), generator=torch.Generator().manual_seed(seed))
    sure = Temperature(prior=0, certainty=0.9)
    parts = [sure.evaluate(logits[where == k], targets[where == k]) for k in range(sites)]
    expected = central(logits, targets)
    z = logits.double()
    nll = [float(F.cross_entropy(z / t, targets, reduction="sum")) for t in (1.0, expected)]
    ratio = 2 * (nll[0] - nll[1])
    for repeats in (1, 3):
        if abs(ratio / repeats - quantile) > 1e-5:
            wanted = expected if ratio / repeats > quantile else 1.0
            counted = sure.model_copy(update={"repeats": repeats})
            assert fitted(counted, parts) == pytest.approx(wanted, rel=1e-6)


def test_an_honest_model_is_left_alone_as_often_as_it_says() -> None:
    logits = torch.randn(60_000, 5, generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.multinomial(
        logits.softmax(1), 1, generator=torch.Generator().manual_seed(1)
    ).squeeze(1)
    sure = Temperature(certainty=0.9, points=32)
    pairs = zip(logits.split(300), targets.split(300), strict=True)
    changed = [fitted(sure, [sure.evaluate(z, y)]) != 1 for z, y in pairs]
    assert 0.04 < sum(changed) / len(changed) < 0.17
    calibration = sure.calibrate(sure.evaluate(logits, targets))
    assert calibration is not None
    if calibration.parameters["temperature"] == 1:
        assert sure.transform(logits, calibration.parameters) is logits
        assert calibration.report["nll_after"] == calibration.report["nll_before"]


def test_derivatives_are_those_of_autograd() -> None:
    logits, targets = problem(1, 30, 4, 3.0, 2.0)
    strategy = Temperature(points=16)
    rows = strategy.evaluate(logits, targets)["grid"]

    def nll(t: Tensor) -> Tensor:
        return F.cross_entropy(logits.double() / t.exp(), targets, reduction="sum")

    for k, t in enumerate(strategy.grid()):
        first = torch.func.grad(nll)(t)
        second = torch.func.grad(torch.func.grad(nll))(t)
        expected = torch.stack([nll(t), first, second])
        torch.testing.assert_close(rows[:, k], expected, rtol=1e-9, atol=1e-9)


def test_a_quintic_is_interpolated_exactly() -> None:
    grid = torch.linspace(-1, 2, 4, dtype=torch.float64)
    x = grid
    rows = torch.stack([x**5 - x, 5 * x**4 - 1, 20 * x**3])
    for t in (-0.9, 0.3, 0.71, 1.99):
        slope, value = slope_and_value(grid, rows, t)
        assert slope == pytest.approx(5 * t**4 - 1, abs=1e-12)
        assert value == pytest.approx(t**5 - t, abs=1e-12)


def test_the_minimum_of_a_parabola() -> None:
    grid = torch.linspace(-1, 2, 16, dtype=torch.float64)
    rows = torch.stack([(grid - 0.3) ** 2, 2 * (grid - 0.3), torch.full((16,), 2.0).double()])
    assert minimum(grid, rows) == (pytest.approx(0.3, abs=1e-12), pytest.approx(0, abs=1e-12))


def test_accuracy_never_changes_and_the_likelihood_does_not_fall() -> None:
    for seed in range(20):
        logits, targets = problem(seed, 50, 5, 8.0, 3.0)
        logits = (logits * 8).round() / 8  # ties, too
        calibration = STRATEGY.calibrate(STRATEGY.evaluate(logits, targets))
        assert calibration is not None
        after = STRATEGY.transform(logits, calibration.parameters)
        assert torch.equal(after.argmax(dim=1), logits.argmax(dim=1))
        report = calibration.report
        assert report["nll_after"] <= report["nll_before"]
        nll = [float(F.cross_entropy(z.double(), targets)) for z in (logits, after)]
        assert [report["nll_before"], report["nll_after"]] == pytest.approx(nll, rel=1e-7)


def test_overconfidence_is_cured() -> None:
    logits, targets = problem(0, 4000, 4, 8.0, 4.0)
    before = scores.pool([scores.sums(logits, targets)])
    calibration = STRATEGY.calibrate(STRATEGY.evaluate(logits, targets))
    assert calibration is not None
    assert calibration.parameters["temperature"] == pytest.approx(4.0, rel=0.1)
    after = scores.pool([scores.sums(STRATEGY.transform(logits, calibration.parameters), targets)])
    assert after["ece"] < 0.2 * before["ece"]
    assert after["accuracy"] == before["accuracy"]


@pytest.mark.parametrize(("sign", "end"), [(1, 0.05), (-1, 20.0)])
def test_a_minimum_outside_of_the_range_takes_the_nearer_end(sign: int, end: float) -> None:
    """Always right: the smaller T the better. Always wrong: the larger."""
    logits = sign * torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert fitted(STRATEGY, [STRATEGY.evaluate(logits, torch.tensor([0, 1]))]) == pytest.approx(end)


def test_without_an_error_the_prior_keeps_confidence_finite() -> None:
    """Every sample right: likelihood alone sharpens to the end of the range."""
    logits = 3 * torch.eye(4).repeat(30, 1) + 0.1 * torch.randn(
        120, 4, generator=torch.Generator().manual_seed(3)
    )
    targets = torch.arange(4).repeat(30)
    assert fitted(STRATEGY, [STRATEGY.evaluate(logits, targets)]) == pytest.approx(0.05)
    strategy = Temperature(certainty=0)
    kept = fitted(strategy, [strategy.evaluate(logits, targets)])
    assert 0.3 < kept < 1.5


@settings(max_examples=10)
@given(seed=st.integers(0, 2**32), sites=st.integers(1, 4))
def test_the_prior_is_one_more_sample_of_any_class(seed: int, sites: int) -> None:
    logits, targets = problem(seed, 80, 3, 4.0, 2.0)
    where = torch.randint(0, sites, (80,), generator=torch.Generator().manual_seed(seed))
    strategy = Temperature(prior=2.0, certainty=0)
    parts = [strategy.evaluate(logits[where == k], targets[where == k]) for k in range(sites)]
    found = fitted(strategy, parts)

    def objective(t: float) -> float:
        z = logits.double() / t
        nll = float(F.cross_entropy(z, targets, reduction="sum"))
        uniform = float(-z.log_softmax(dim=1).mean(dim=1).sum()) / 80
        return nll + 2.0 * uniform

    margin = float(
        (logits.double().gather(1, targets[:, None])[:, 0] - logits.double().mean(1)).mean()
    )
    if margin > 0 and 0.06 < found < 19:
        assert objective(found) <= min(objective(found * 1.001), objective(found / 1.001))


def test_small_on_the_wire_and_empty_without_samples() -> None:
    empty = Temperature(points=340).evaluate(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert sum(v.numel() * v.element_size() for v in empty.values()) <= 8192
    assert Temperature(points=340).calibrate(empty) is None
    assert STRATEGY.calibrate({}) is None
