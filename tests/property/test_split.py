"""The division of pictures over sites, whatever labels, seeds and shapes it is given."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "deploy" / "examples"))

from example_data import split

SEEDS = st.integers(0, 2**32 - 1)
LABELS = st.lists(st.integers(0, 9), min_size=2, max_size=300).map(
    lambda labels: np.array(labels, dtype=np.int64)
)
ALPHAS = st.one_of(st.none(), st.just(0.0), st.floats(1e-6, 1e6))


@given(LABELS, st.integers(1, 12), ALPHAS, SEEDS)
@settings(max_examples=150, deadline=None)
def test_every_picture_is_in_exactly_one_part(labels, parts, alpha, seed):
    assume(len(labels) >= 2 * parts)
    divided = split.divide(labels, parts=parts, alpha=alpha, seed=seed)
    assert len(divided) == parts
    assert np.array_equal(np.sort(np.concatenate(divided)), np.arange(len(labels)))
    assert min(map(len, divided)) >= min(split.LEAST_PER_PART, len(labels) // parts)
    assert all(np.all(np.diff(part) > 0) for part in divided)


@given(LABELS, st.integers(1, 12), ALPHAS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_every_site_computes_the_same_division(labels, parts, alpha, seed):
    assume(len(labels) >= 2 * parts)
    here = split.divide(labels, parts=parts, alpha=alpha, seed=seed)
    np.random.seed(7)  # the global generator must not matter
    there = split.divide(labels.copy(), parts=parts, alpha=alpha, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(here, there, strict=True))


@given(LABELS, st.integers(1, 12), SEEDS)
@settings(max_examples=50, deadline=None)
def test_iid_parts_have_equal_sizes(labels, parts, seed):
    assume(len(labels) >= 2 * parts)
    sizes = [len(part) for part in split.divide(labels, parts=parts, alpha=0, seed=seed)]
    assert max(sizes) - min(sizes) <= 1


@given(LABELS, st.data(), SEEDS)
@settings(max_examples=100, deadline=None)
def test_proxy_and_shared_pictures_are_apart(labels, data, seed):
    proxy = data.draw(st.integers(0, len(labels) - 1))
    subset = data.draw(st.integers(0, len(labels) - proxy))
    shared, held_back = split.pool(labels, subset=subset, proxy=proxy, seed=seed)
    assert len(shared) == (subset or len(labels) - proxy)
    assert len(held_back) == proxy
    assert len(np.union1d(shared, held_back)) == len(shared) + proxy
    assert set(shared) | set(held_back) <= set(range(len(labels)))


@given(LABELS, st.data(), SEEDS)
@settings(max_examples=50, deadline=None)
def test_a_smaller_subset_is_contained_in_a_larger_one(labels, data, seed):
    large = data.draw(st.integers(1, len(labels)))
    small = data.draw(st.integers(1, large))
    of = {n: split.pool(labels, subset=n, proxy=0, seed=seed).shared for n in (small, large)}
    assert np.array_equal(of[small], of[large][:small])


@given(LABELS, st.floats(0.001, 0.999), st.integers(0, 100), SEEDS)
@settings(max_examples=100, deadline=None)
def test_validation_is_carved_out_of_the_part(labels, fraction, part, seed):
    train, val = split.carve(labels, fraction=fraction, part=part, seed=seed)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
    assert len(train) >= 1
    assert len(val) >= 1
    assert abs(len(val) - fraction * len(labels)) <= 1


@given(LABELS, SEEDS, st.data())
@settings(max_examples=100, deadline=None)
def test_each_stretch_from_the_front_has_the_proportions_of_the_whole(labels, seed, data):
    order = split.balanced_order(labels, np.random.RandomState(seed))
    assert np.array_equal(np.sort(order), np.arange(len(labels)))
    k, n = data.draw(st.integers(0, len(labels))), len(labels)
    classes, sizes = np.unique(labels, return_counts=True)
    for label, m in zip(classes, sizes, strict=True):
        got = np.count_nonzero(labels[order[:k]] == label)
        assert abs(got - k * m / n) <= 1 + len(classes) * m / n


@given(st.floats(0.05, 50.0), st.integers(2, 6))
@settings(max_examples=10, deadline=None)
def test_shares_follow_the_dirichlet_distribution(alpha, parts):
    random = np.random.RandomState(0)
    shares = np.array([split._dirichlet(random, alpha, parts) for _ in range(4000)])
    assert np.allclose(shares.sum(axis=1), 1.0)
    variance = (1 / parts) * (1 - 1 / parts) / (parts * alpha + 1)
    # Six standard errors of the mean; 15 % of the variance is about as much of its own.
    assert shares.mean(axis=0) == pytest.approx(1 / parts, abs=6 * (variance / 4000) ** 0.5)
    assert shares.var(axis=0) == pytest.approx(variance, rel=0.15)


def test_amounts_are_rounded_up_where_most_is_lost():
    for amounts, counts in (
        ([0.2, 1.2, 1.6], [0, 1, 2]),
        ([2.5, 0.1, 0.4], [3, 0, 0]),
        ([1.4, 1.3, 1.3], [2, 1, 1]),
        ([3.0, 0.0, 0.0], [3, 0, 0]),
    ):
        assert split._whole(np.array(amounts)).tolist() == counts
