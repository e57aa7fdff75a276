"""Maps fitted from sums against maps fitted to the samples in one place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression
from torch import Tensor
from torch.nn import functional as F

from orchestrator.arithmetic.assessment import SPLITS
from protos.plan import StrategyChoice
from strategies import scores
from strategies.calibration import top_label
from strategies.calibration.histogram_binning import HistogramBinning
from strategies.calibration.isotonic import Isotonic
from strategies.calibration.vector_scaling import VectorScaling, unpacked
from strategies.context import Calibration
from strategies.protocol import Strategy
from strategies.stack import Stack
from tests.unit.test_temperature import problem

MAPS: tuple[Strategy, ...] = (HistogramBinning(), Isotonic(), VectorScaling())
each = pytest.mark.parametrize("strategy", MAPS, ids=lambda s: s.name)


def fitted(strategy: Strategy, *parts: dict[str, Tensor]) -> Calibration:
    calibration = strategy.calibrate(scores.add(*parts))
    assert calibration is not None
    return calibration


def central_vector(logits: Tensor, targets: Tensor) -> float:
    """The least NLL that a scale and a shift for each class reach, by L-BFGS."""
    classes = logits.shape[1]
    theta = torch.cat([torch.ones(classes), torch.zeros(classes)]).double().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(logits.double() * theta[:classes] + theta[classes:], targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(closure().detach())


@each
@settings(max_examples=8)
@given(seed=st.integers(0, 2**32), sites=st.integers(1, 5))
def test_any_split_gives_the_map_of_the_union(strategy: Strategy, seed: int, sites: int) -> None:
    logits, targets = problem(seed, 200, 4, 6.0, 2.0)
    where = torch.randint(0, sites, (200,), generator=torch.Generator().manual_seed(seed))
    parts = [strategy.evaluate(logits[where == k], targets[where == k]) for k in range(sites)]
    split = fitted(strategy, *parts)
    whole = fitted(strategy, strategy.evaluate(logits, targets))
    a, b = (strategy.transform(logits, c.parameters) for c in (split, whole))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each
def test_overconfidence_is_cured(strategy: Strategy) -> None:
    logits, targets = problem(0, 8000, 10, 8.0, 4.0)
    calibration = fitted(strategy, strategy.evaluate(logits[:4000], targets[:4000]))
    before = scores.pool([scores.sums(logits[4000:], targets[4000:])])
    after_outputs = strategy.transform(logits[4000:], calibration.parameters)
    after = scores.pool([scores.sums(after_outputs, targets[4000:])])
    assert after["ece"] < 0.2 * before["ece"]
    assert after["aece"] < 0.25 * before["aece"]
    assert after["nll"] < before["nll"]
    torch.testing.assert_close(after_outputs.logsumexp(1).isfinite(), torch.ones(4000).bool())


@each
def test_too_few_samples_leave_no_map(strategy: Strategy) -> None:
    sums = strategy.evaluate(*problem(0, 30, 4, 3.0, 1.0))
    assert strategy.calibrate(sums) is not None
    assert strategy.model_copy(update={"at_least": 31}).calibrate(sums) is None
    empty = strategy.evaluate(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert strategy.calibrate(empty) is None
    assert strategy.calibrate({}) is None


@each
def test_small_on_the_wire(strategy: Strategy) -> None:
    sums = strategy.evaluate(*problem(0, 30, 10, 3.0, 1.0))
    assert sum(v.numel() * v.element_size() for v in sums.values()) < 14_000


@pytest.mark.parametrize("strategy", MAPS[:2], ids=lambda s: s.name)
def test_the_named_class_stays(strategy: Strategy) -> None:
    for seed in range(20):
        logits, targets = problem(seed, 60, 5, 8.0, 3.0)
        logits = (logits * 4).round() / 4  # ties, and wild ones
        calibration = fitted(strategy, strategy.evaluate(logits, targets))
        after = strategy.transform(logits, calibration.parameters)
        assert torch.equal(after.argmax(1), logits.argmax(1))
        torch.testing.assert_close(after.exp().sum(1), torch.ones(60).double())


def test_the_other_classes_keep_their_proportions() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0]])
    after = top_label.relabelled(logits, [0.5], [0.2, 0.7])
    assert float(after.exp().max()) == pytest.approx(0.7)
    torch.testing.assert_close(after[0, 1:] - after[0, 1], logits[0, 1:].double() - 1.0)
    # 0.2 would let the second class overtake: as low as the order allows, and no lower.
    low = top_label.relabelled(logits, [0.9], [0.2, 0.7]).exp()[0]
    assert low[0] > low[1]
    assert float(low[0]) == pytest.approx(float(low[1]), rel=1e-6)


def test_isotonic_is_that_of_the_rounded_samples() -> None:
    logits, targets = problem(5, 700, 4, 6.0, 3.0)
    confidence, named = logits.double().softmax(1).max(1)
    rounded = top_label.middles()[scores.fine_bin(confidence)].numpy()
    oracle = IsotonicRegression().fit(rounded, (named == targets).double().numpy())
    strategy = Isotonic(prior=0)
    found = fitted(strategy, strategy.evaluate(logits, targets)).parameters
    values = np.array(found["values"])[np.searchsorted(found["edges"], rounded, side="left")]
    np.testing.assert_allclose(values, oracle.predict(rounded), atol=1e-12)


def test_a_bin_says_how_often_it_was_right() -> None:
    logits, targets = problem(6, 3000, 4, 6.0, 3.0)
    strategy = HistogramBinning(prior=0, bins=5)
    found = fitted(strategy, strategy.evaluate(logits, targets)).parameters
    confidence, named = logits.double().softmax(1).max(1)
    index = torch.bucketize(confidence, torch.tensor(found["edges"], dtype=torch.float64))
    right = (named == targets).double()
    assert 2 <= len(found["values"]) <= 5
    for k, value in enumerate(found["values"]):
        assert value == pytest.approx(float(right[index == k].mean()), abs=1e-12)


def test_a_prior_keeps_certainty_away() -> None:
    logits = torch.tensor([[4.0, 0.0]]).repeat(20, 1)
    for strategy in MAPS[:2]:
        found = fitted(strategy, strategy.evaluate(logits, torch.zeros(20, dtype=torch.long)))
        assert found.parameters["values"][-1] == pytest.approx((20 + 0.9825) / 21)


def test_vector_gradient_and_hessian_are_those_of_autograd() -> None:
    logits, targets = problem(1, 25, 3, 3.0, 2.0)
    strategy = VectorScaling(points=4)
    nll, slopes, bends = unpacked(strategy.evaluate(logits, targets)["moments"])

    def objective(theta: Tensor) -> Tensor:
        return F.cross_entropy(logits.double() * theta[:3] + theta[3:], targets, reduction="sum")

    for k, t in enumerate(strategy.grid()):
        theta = torch.cat([(-t).exp().repeat(3), torch.zeros(3).double()])
        torch.testing.assert_close(nll[k], objective(theta))
        torch.testing.assert_close(slopes[k], torch.func.grad(objective)(theta))
        expected = torch.autograd.functional.hessian(objective, theta)
        torch.testing.assert_close(bends[k], expected)


def test_one_newton_step_gets_most_of_what_there_is() -> None:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        logits = 6 * torch.randn(2000, 6, generator=generator)
        scale, shift = torch.rand(6, generator=generator) + 0.5, torch.randn(6, generator=generator)
        p = (logits / 2 * scale + shift).softmax(1)
        targets = torch.multinomial(p, 1, generator=generator).squeeze(1)
        strategy = VectorScaling(prior=0)
        found = fitted(strategy, strategy.evaluate(logits, targets))
        reached = float(F.cross_entropy(strategy.transform(logits, found.parameters), targets))
        temperature, least = found.report["nll_temperature"], central_vector(logits, targets)
        assert reached <= temperature - 0.75 * (temperature - least)


def test_too_many_classes_are_refused_by_what_to_do() -> None:
    with pytest.raises(ValueError, match="use temperature"):
        VectorScaling().evaluate(torch.zeros(2, 101), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("name", [*(s.name for s in MAPS), "temperature"])
def test_all_that_a_site_sends_for_calibration_is_below_64_kb_at_ten_classes(name: str) -> None:
    """Both exchanges of a round: scores of two sets before and after the map, its sums, and sets'."""
    stack = Stack([StrategyChoice(name=name), StrategyChoice(name="conformal")])
    logits, targets = problem(0, 50, 10, 3.0, 1.0)
    own = scores.narrowed(scores.sums(logits, targets))
    sent = {f"{split}/{key}": v for key, v in own.items() for split in SPLITS}
    for split in ("val", "test"):
        sent |= stack.observe(logits, targets, split)
    released = stack.release(sent | stack.evaluate(logits, targets))
    assert (
        sum(v.numel() * v.element_size() for v in released.values()) < 62_500
    )  # and 1.5 KB of headers


def test_sums_in_fp32_give_the_same_map() -> None:
    stack = Stack([StrategyChoice(name="vector_scaling")])
    sums = stack.evaluate(*problem(2, 3000, 10, 6.0, 2.0))
    exact, sent = (stack.calibrate(s)["vector_scaling"] for s in (sums, stack.release(sums)))
    assert stack.release(sums)["vector_scaling/moments"].dtype == torch.float32
    for key in ("scale", "shift"):
        assert sent.parameters[key] == pytest.approx(exact.parameters[key], rel=1e-4, abs=1e-5)
