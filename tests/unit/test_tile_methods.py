"""The methods that act on the reduced update: FedAvgM, trimmed mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos.manifest import Manifest, TensorSpec
from strategies.context import Moment
from strategies.outer.fedavgm import FedAvgM
from strategies.robust.order import BLOCK, sort_rows, sort_with_rows
from strategies.robust.trimmed_mean import TrimmedMean
from strategies.stack import weighted_mean

TILE = Manifest((TensorSpec("w", (3,), "float32"),)).tiles[0]
EQUAL = torch.full((5,), 0.2, dtype=torch.float64)


def steps(strategy: FedAvgM, gradients: list[list[float]]) -> list[list[float]]:
    state, out = strategy.init_state(TILE), []
    for number, gradient in enumerate(gradients, start=1):
        moment = Moment(round=number, seed=0, sites=5)
        step, state = strategy.step(
            torch.tensor(gradient).float(), torch.zeros(3), state, TILE, moment
        )
        out.append(step.tolist())
    return out


def test_velocity_by_hand() -> None:
    """v1 = g1; v2 = 0.5 v1 + g2; v3 = 0.5 v2 + g3."""
    found = steps(FedAvgM(momentum=0.5, learning_rate=2.0), [[1, 0, -2], [1, 4, 0], [0, 0, 1]])
    assert found == [[2, 0, -4], [3, 8, -2], [1.5, 4, 1]]


def test_nesterov_by_hand() -> None:
    """g + 0.5 v with v1 = g1 = 1, v2 = 0.5 + 1."""
    found = steps(FedAvgM(momentum=0.5, nesterov=True), [[1, 1, 1], [1, 1, 1]])
    assert found == [[1.5] * 3, [1.75] * 3]


def test_it_is_sgd_of_torch() -> None:
    gradients = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    for nesterov in (False, True):
        x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        oracle = torch.optim.SGD([x], lr=0.7, momentum=0.9, nesterov=nesterov)
        for gradient in gradients:
            x.grad = gradient.double()
            oracle.step()
        strategy = FedAvgM(momentum=0.9, learning_rate=0.7, nesterov=nesterov)
        moved = torch.tensor(steps(strategy, gradients.tolist())).double().sum(dim=0)
        torch.testing.assert_close(-moved, x.detach(), rtol=1e-6, atol=1e-6)


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=3, max_size=3))
def test_without_momentum_it_is_the_average(gradient: list[float]) -> None:
    strategy = FedAvgM(momentum=0.0, learning_rate=1.0)
    given_ = torch.tensor(gradient)
    (once, twice) = steps(strategy, [gradient, gradient])
    assert torch.equal(torch.tensor(once), given_)
    assert torch.equal(torch.tensor(twice), given_)


def test_trimmed_mean_by_hand() -> None:
    rows = torch.tensor([[1.0, 9, 0], [2, 1, 0], [3, 2, 0], [4, 3, 1e9], [1e9, -1e9, 0]])
    assert TrimmedMean(trim=0.2).reduce(rows, EQUAL, TILE).tolist() == pytest.approx([3, 2, 0])
    assert TrimmedMean(trim=0.5).reduce(rows, EQUAL, TILE).tolist() == [3, 2, 0]
    assert TrimmedMean(trim=0.5).reduce(rows[:4], EQUAL[:4], TILE).tolist() == [2.5, 2.5, 0]


def test_kept_values_have_their_weights() -> None:
    rows = torch.tensor([[5.0] * 3, [1.0] * 3, [2.0] * 3, [-7.0] * 3])
    weights = torch.tensor([0.1, 0.6, 0.2, 0.1], dtype=torch.float64)
    found = TrimmedMean(trim=0.25).reduce(rows, weights, TILE)
    assert found.tolist() == pytest.approx([(0.6 * 1 + 0.2 * 2) / 0.8] * 3)


@given(
    n=st.integers(1, 7), trim=st.floats(0, 0.5), seed=st.integers(0, 2**32), lie=st.floats(1, 1e6)
)
def test_it_stays_among_the_honest(n: int, trim: float, seed: int, lie: float) -> None:
    """floor(trim n) liars can't move a coordinate out of the range of the others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 3, generator=generator)
    liars = min(int(trim * n), (n - 1) // 2)
    if liars:
        rows[:liars] = lie
    weights = torch.full((n,), 1 / n, dtype=torch.float64)
    found = TrimmedMean(trim=trim).reduce(rows, weights, TILE)
    honest = rows[liars:].double()
    assert (found >= honest.min(dim=0).values - 1e-9).all()
    assert (found <= honest.max(dim=0).values + 1e-9).all()
    torch.testing.assert_close(
        TrimmedMean(trim=trim).reduce(rows[torch.randperm(n, generator=generator)], weights, TILE),
        found,
    )


def test_without_trimming_it_is_the_weighted_mean() -> None:
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    assert torch.equal(
        TrimmedMean(trim=0.0).reduce(rows, weights, TILE), weighted_mean(rows, weights)
    )


def test_a_site_without_weight_has_no_say() -> None:
    rows = torch.tensor([[1.0] * 3, [2.0] * 3, [1e9] * 3])
    weights = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    assert TrimmedMean(trim=0.5).reduce(rows, weights, TILE).tolist() == [1.5] * 3
    assert TrimmedMean().reduce(rows, torch.zeros(3).double(), TILE).tolist() == [0.0] * 3


@pytest.mark.parametrize("n", range(1, 20))
def test_the_network_sorts_every_order_of_zeros_and_ones(n: int) -> None:
    """Then it sorts everything (Knuth's 0-1 principle); beyond 2^12 columns a sample of them."""
    generator = torch.Generator().manual_seed(n)
    columns = torch.arange(2**n) if n <= 12 else torch.randint(2**n, (2**12,), generator=generator)
    rows = (columns[None, :] >> torch.arange(n)[:, None]) & 1
    expected = rows.sort(dim=0).values
    assert torch.equal(torch.stack(sort_rows(rows.clone())), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 5, 16, 33])
def test_values_keep_their_rows(n: int, dtype: torch.dtype) -> None:
    """As a stable sort has them, with ties, both signs, tiny and huge values."""
    generator = torch.Generator().manual_seed(n)
    rows = torch.randint(-3, 4, (n, 500), generator=generator).to(dtype)
    rows *= torch.tensor([1e-42, 1e-3, 1.0, 1e38]).to(dtype).repeat(125)
    rows += 0.0  # no zeros of negative sign
    expected = rows.sort(dim=0, stable=True)
    for rank, (values, sites) in enumerate(sort_with_rows(rows, 0, n)):
        assert torch.equal(values, expected.values[rank])
        assert torch.equal(sites, expected.indices[rank])


def test_blocks_of_coordinates_do_not_show() -> None:
    elements = 2 * BLOCK + 77
    tile = Manifest((TensorSpec("w", (elements,), "float32"),)).tiles[0]
    rows = torch.randn(6, elements, generator=torch.Generator().manual_seed(3))
    weights = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.05, 0.2], dtype=torch.float64)
    order = rows.double().sort(dim=0, stable=True)
    kept, shares = order.values[1:5], weights[order.indices[1:5]]
    expected = (kept * shares).sum(dim=0) / shares.sum(dim=0)
    torch.testing.assert_close(
        TrimmedMean(trim=0.2).reduce(rows, weights, tile), expected, rtol=1e-14, atol=1e-15
    )
    middle = order.values[2:4].mean(dim=0)
    assert torch.equal(TrimmedMean(trim=0.5).reduce(rows, weights, tile), middle)
