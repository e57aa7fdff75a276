"""The soft tree: its formulas by hand, and that it says what the model says."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from protos.plan import OptimizerChoice, Schedule, Work
from strategies.protocol import Draft, RoundSummary
from strategies.trees.soft_tree import DRAWING, WEIGHTS, Balance, SoftTree, Tree, grow
from tests.support.refinements import Proxy, refinement


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def tree() -> Tree:
    """Depth 2 over one number: the root asks x, its left child 2x + 1, its right child -x."""
    tree = Tree(1, 2, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        tree.filters.copy_(torch.tensor([[1.0], [2.0], [-1.0]]))
        tree.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
        tree.leaves.copy_(torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 3.0]]))
    return tree


def test_paths_and_loss_by_hand(tree: Tree) -> None:
    x, t = 0.5, (0.3, 0.7)
    root, left, right = sigmoid(0.5), sigmoid(2.0), sigmoid(-0.5)
    paths = [(1 - root) * (1 - left), (1 - root) * left, root * (1 - right), root * right]
    inputs = torch.tensor([[x]])
    found = tree.log_paths(tree.decisions(inputs)).exp()[0].tolist()
    assert found == pytest.approx([1.0, 1 - root, root, *paths], abs=1e-6)
    expected = 0.0
    for path, logits in zip(paths, tree.leaves.tolist(), strict=True):
        norm = math.log(sum(math.exp(z) for z in logits))
        expected += path * -sum(k * (z - norm) for k, z in zip(t, logits, strict=True))
    assert tree.loss(inputs, torch.tensor([t])).item() == pytest.approx(expected, abs=1e-6)


def test_it_says_what_its_likeliest_leaf_says(tree: Tree) -> None:
    inputs = torch.tensor([[0.5], [-3.0], [3.0]])
    likeliest = tree.log_paths(tree.decisions(inputs))[:, 3:].argmax(dim=1)
    assert torch.equal(tree(inputs), tree.leaves[likeliest])
    assert likeliest.tolist() == [2, 0, 2]


def test_the_penalty_by_hand(tree: Tree) -> None:
    """alpha of the root is the mean of p; of a child the mean weighed by the way to it."""
    inputs = torch.tensor([[0.5], [-1.0]])
    p = [[sigmoid(x), sigmoid(2 * x + 1), sigmoid(-x)] for x in (0.5, -1.0)]
    to_left, to_right = [1 - row[0] for row in p], [row[0] for row in p]
    root = (p[0][0] + p[1][0]) / 2
    left = (to_left[0] * p[0][1] + to_left[1] * p[1][1]) / sum(to_left)
    right = (to_right[0] * p[0][2] + to_right[1] * p[1][2]) / sum(to_right)
    left, right = (0.5 + left) / 2, (0.5 + right) / 2  # the window of depth 1: two batches
    weights = {root: 0.1, left: 0.05, right: 0.05}
    expected = -sum(w * (math.log(a) + math.log(1 - a)) / 2 for a, w in weights.items())
    balance, decisions = Balance(tree, 0.1), tree.decisions(inputs)
    found = balance.penalty(decisions, tree.log_paths(decisions))
    assert found.item() == pytest.approx(expected, abs=1e-6)
    assert balance.alpha.tolist() == pytest.approx([root, left, right], abs=1e-6)


def test_a_tree_of_depth_two_learns_four_quarters() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = 2 * torch.rand(400, 2, generator=generator) - 1
    classes = (inputs[:, 0] > 0).long() * 2 + (inputs[:, 1] > 0).long()
    tree = grow(
        inputs, nn.functional.one_hot(classes).float(), depth=2, steps=400, learning_rate=0.05,
        batch_size=64, strength=0.1, generator=generator,
    )  # fmt: skip
    assert (tree(inputs).argmax(dim=1) == classes).double().mean() > 0.95


class Pictures(Proxy):
    """Proxy inputs that are pictures of two pixels by two."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    def proxy_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(7)
        return TensorDataset(torch.randn(300, 1, 2, 2, generator=generator))


def test_refine_keeps_a_tree_that_can_be_drawn() -> None:
    at = refinement(Pictures())
    before = {k: v.clone() for k, v in at.model.state_dict().items()}
    report = SoftTree(steps=600, depth=3, learning_rate=0.05).refine(at)
    assert all(torch.equal(v, before[k]) for k, v in at.model.state_dict().items())
    assert report["fidelity"] > 0.7
    assert report["samples"] == 270
    tree = Tree(4, 3, 3, torch.Generator())
    tree.load_state_dict(load(at.files[WEIGHTS]))
    drawn = json.loads(at.files[DRAWING])
    assert drawn["shape"] == [2, 2]
    assert len(drawn["inner"]) == 7
    assert len(drawn["leaves"]) == 8
    assert drawn["report"] == report
    assert all(len(node["filter"]) == 4 for node in drawn["inner"])
    assert max(abs(v) for v in drawn["inner"][0]["filter"]) == 100
    assert sum(leaf["reached"] for leaf in drawn["leaves"]) == pytest.approx(1, abs=1e-5)
    expected = (100 * tree.leaves.softmax(dim=1)).round().int().tolist()
    assert [leaf["p"] for leaf in drawn["leaves"]] == expected


def test_a_tree_in_every_nth_round_and_in_the_last() -> None:
    strategy = SoftTree(steps=2, depth=1, every=5)
    draft = Draft(1, 3, RoundSummary(), (), Work(epochs=1), Schedule(lr=0.1), OptimizerChoice(), 8)
    _, memo = strategy.plan(draft, {})
    at = refinement(Pictures())  # round 3 of 3
    at.memo = memo
    assert "fidelity" in strategy.refine(at)
    at.memo = {"rounds": 4}
    assert strategy.refine(at) == {}
