"""A soft decision tree of the averaged model: every decision can be read as a path of filters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from protos.errors import TaskFailed
from strategies.context import Draft, Memo, Refinement, seeded
from strategies.distillation.proxy import Source, needed_of, proxy_of
from strategies.holdout import holdout
from strategies.protocol import Family, Need, Strategy
from strategies.row import Row, Seed, Site, at_least

WEIGHTS, DRAWING = "soft_tree/tree.safetensors", "soft_tree/tree.json"
MAX_SIDE = 16
"""Sides of a filter in the drawing: larger ones are averaged down."""


class Tree(nn.Module):
    """A complete binary tree of learnt linear filters.

    Inner nodes are numbered as in a heap: 0 is the root, 2i + 1 and 2i + 2 are the left and the
    right child of i; leaves from left to right.

    Args:
        features: Numbers of an input.
        classes: Classes.
        depth: Decisions on a path, >= 1.
        generator: Draws the filters.
    """

    def __init__(self, features: int, classes: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        inner, leaves = 2**depth - 1, 2**depth
        self.depth = depth
        bound = features**-0.5
        draw = torch.rand(inner, features, generator=generator)
        self.filters = nn.Parameter((2 * draw - 1) * bound)
        self.bias = nn.Parameter(torch.zeros(inner))
        self.beta = nn.Parameter(torch.ones(inner))
        self.leaves = nn.Parameter(0.1 * torch.randn(leaves, classes, generator=generator))
        right, left = torch.zeros(2, 2 * leaves - 1, inner)
        for node in range(1, 2 * leaves - 1):
            parent = (node - 1) // 2
            right[node], left[node] = right[parent], left[parent]
            (left if node % 2 else right)[node, parent] = 1
        self.register_buffer("right", right, persistent=False)
        self.register_buffer("left", left, persistent=False)

    def decisions(self, inputs: Tensor) -> Tensor:
        """What beta (w x + b) is at each inner node, (n, inner); positive goes right."""
        return self.beta * F.linear(inputs.flatten(1).float(), self.filters, self.bias)

    def log_paths(self, decisions: Tensor) -> Tensor:
        """Logarithm of the probability to pass each node, inner ones first, (n, inner + leaves)."""
        right: Tensor = self.get_buffer("right")
        left: Tensor = self.get_buffer("left")
        return F.logsigmoid(decisions) @ right.T + F.logsigmoid(-decisions) @ left.T

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over leaves of P(leaf) times the cross-entropy of its distribution, mean over samples.

        Args:
            inputs: (n, …).
            targets: Distributions, (n, classes).
        """
        return self._loss(self.log_paths(self.decisions(inputs)), targets)

    def _loss(self, log_paths: Tensor, targets: Tensor) -> Tensor:
        paths = log_paths[:, len(self.filters) :].exp()
        crossed = -targets @ F.log_softmax(self.leaves, dim=1).T
        return (paths * crossed).sum(dim=1).mean()

    def forward(self, inputs: Tensor) -> Tensor:
        """The logits of the leaf with the largest path probability, (n, classes)."""
        paths = self.log_paths(self.decisions(inputs))[:, len(self.filters) :]
        return self.leaves[paths.argmax(dim=1)]


class Balance:
    """Keeps inner nodes from sending everything one way.

    alpha_i is the share of what reaches node i that goes right, a moving average over about 2^d
    batches at depth d, since deep nodes see few samples of a batch.

    Args:
        tree: Whose.
        strength: lambda.
    """

    def __init__(self, tree: Tree, strength: float) -> None:
        inner = len(tree.filters)
        depths = torch.tensor([math.floor(math.log2(i + 1)) for i in range(inner)])
        self.tree = tree
        self.weight = strength * 0.5**depths
        self.fresh = 0.5**depths
        self.alpha = torch.full((inner,), 0.5)

    def penalty(self, decisions: Tensor, log_paths: Tensor) -> Tensor:
        """-lambda sum_i 2^-d_i (log alpha_i + log(1 - alpha_i)) / 2, and the moving average's step."""
        inner = len(self.alpha)
        reach = log_paths[:, :inner].exp()
        now = (reach * decisions.sigmoid()).sum(0) / reach.sum(0).clamp_min(1e-12)
        alpha = (1 - self.fresh) * self.alpha + self.fresh * now
        self.alpha = alpha.detach()
        alpha = alpha.clamp(1e-6, 1 - 1e-6)
        return -(self.weight * (alpha.log() + (1 - alpha).log()) / 2).sum()


def grow(
    inputs: Tensor,
    targets: Tensor,
    *,
    depth: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
    strength: float,
    generator: torch.Generator,
) -> Tree:
    """Train a tree.

    Args:
        inputs: (n, …).
        targets: Distributions over the classes, (n, classes): a teacher's, or labels as one-hot.
        depth: Decisions on a path.
        steps: Adam's steps.
        learning_rate: At the first step; it falls to 0 along a cosine.
        batch_size: Samples of a step.
        strength: lambda of `Balance`.
        generator: Draws filters and batches.

    Raises:
        TaskFailed: The loss is not finite.
    """
    tree = Tree(inputs[0].numel(), targets.shape[1], depth, generator)
    balance = Balance(tree, strength)
    optimizer = torch.optim.Adam(tree.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    done = 0
    while done < steps:
        for rows in torch.split(torch.randperm(len(inputs), generator=generator), batch_size):
            decisions = tree.decisions(inputs[rows])
            log_paths = tree.log_paths(decisions)
            loss = tree._loss(log_paths, targets[rows]) + balance.penalty(decisions, log_paths)
            if not math.isfinite(loss.item()):
                raise TaskFailed("soft_tree: the loss is not finite; lower learning_rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    return tree.eval()


class SoftTree(Strategy):
    """A tree that says what the averaged model says, in a form that a person can follow.

    Inner node i sends an input x to its right child with probability p_i, leaf l has a
    distribution Q^l, P^l(x) is the probability of the path to it, and T(x) are the model's
    probabilities on a proxy sample::

        p_i(x) = sigmoid(beta_i (w_i x + b_i))        Q^l = softmax(phi^l)
        L(x) = sum_l P^l(x) ( - sum_k T_k(x) log Q^l_k )
        C = - lambda sum_i 2^(-d_i) (log alpha_i + log(1 - alpha_i)) / 2
        alpha_i = sum_x P^i(x) p_i(x) / sum_x P^i(x)

    L + C is minimised by Adam. What the tree says of an input is the distribution of the leaf with
    the largest path probability.

    The average is not touched. The tree is kept with the round, ``farflung export RUN DIR --of
    soft_tree`` gives it out (``tree.safetensors``, ``tree.json``), and the page draws it with its
    fidelity: the share of proxy samples, held out from its training, whose class is the model's.

    Degenerate case: ``steps = 0`` makes no tree.

    Departures: the loss is that of the public re-implementation, a mean of cross-entropies; the
    paper takes the logarithm of their sum. Depth 5 instead of 8, for 31 filters can be looked at.
    alpha is a moving average over about 2^d batches at depth d; the paper says only that the
    window grows with the depth.

    Attributes:
        proxy: Where the inputs come from: task, folder:/PATH, condensed, or generated.
        samples: At most so many of them, the first ones, >= 10.
        held_out: Share of them that only measures the fidelity, in (0, 1).
        depth: Decisions on a path, 1 to 10.
        steps: Adam's steps, >= 0.
        learning_rate: Adam's at the first step, > 0; it falls to 0 along a cosine.
        batch_size: Proxy samples of a step, >= 1.
        strength: lambda, >= 0.
        every: In every how many rounds a tree is made; in the run's last one in any case.
    """

    name: ClassVar[str] = "soft_tree"
    family: ClassVar[Family] = "trees"
    summary: ClassVar[str] = "A soft decision tree that explains the averaged model."
    paper: ClassVar[str] = (
        "Frosst, Hinton: Distilling a Neural Network Into a Soft Decision Tree, 2017, "
        "arXiv:1711.09784"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"proxy data", "orchestrator task", "logits"})
    degenerate: ClassVar[Mapping[str, Any]] = {"steps": 0}

    proxy: Source = "task"
    samples: int = Field(10_000, ge=10)
    held_out: float = Field(0.1, gt=0, lt=1)
    depth: int = Field(5, ge=1, le=10)
    steps: int = Field(3000, ge=0)
    learning_rate: float = Field(0.01, gt=0)
    batch_size: int = Field(64, ge=1)
    strength: float = Field(0.1, ge=0)
    every: int = Field(1, ge=1)

    @property
    def needed(self) -> frozenset[Need]:
        """Of a task's proxy data only what is taken from there."""
        return needed_of(self.needs, self.proxy)

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        """Remember how many rounds there are: the last one has a tree in any case."""
        return draft, {"rounds": draft.rounds} if self.steps else memo

    def refine(self, refinement: Refinement) -> dict[str, float]:
        """Grow the tree of a round.

        Returns:
            ``fidelity``; ``leaves`` that a held-out sample reaches; ``depth``; ``samples``; and where
            the orchestrator's task has test data ``accuracy`` there, and ``accuracy_lost`` against
            the model.

        Raises:
            TaskFailed: There is no proxy data, inputs are no tensors, or the loss is not finite.
        """
        last = refinement.round >= refinement.memo.get("rounds", refinement.round)
        if self.steps == 0 or (refinement.round % self.every and not last):
            return {}
        proxy = proxy_of(refinement, self.proxy, self.samples, 256, self.name)
        model = refinement.model.to(refinement.device).eval()
        inputs = proxy.inputs(torch.arange(proxy.size))
        if not isinstance(inputs, Tensor):
            raise TaskFailed("soft_tree: inputs must be single tensors", strategy=self.name)
        inputs, logits = inputs.cpu().float(), proxy.logits(model)
        generator = seeded(refinement.seed, refinement.round, self.name)
        order = torch.randperm(proxy.size, generator=generator)
        count = max(1, round(self.held_out * proxy.size))
        judged, taught = order[:count], order[count:]
        tree = grow(
            inputs[taught],
            logits[taught].softmax(dim=1),
            depth=self.depth,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            strength=self.strength,
            generator=generator,
        )
        with torch.no_grad():
            said = tree(inputs[judged])
            paths = tree.log_paths(tree.decisions(inputs[judged])).exp()
        same = said.argmax(dim=1) == logits[judged].argmax(dim=1)
        reached = paths[:, len(tree.filters) :].argmax(dim=1)
        report = {
            "fidelity": float(same.double().mean()),
            "leaves": float(len(set(reached.tolist()))),
            "depth": float(self.depth),
            "samples": float(len(taught)),
        }
        report |= self._tested(refinement, tree, model)
        refinement.files[WEIGHTS] = save({k: v.contiguous() for k, v in tree.state_dict().items()})
        drawn = drawing(tree, paths.mean(dim=0), tuple(inputs.shape[1:]), report)
        refinement.files[DRAWING] = json.dumps(drawn, separators=(",", ":")).encode()
        return report

    def _tested(self, refinement: Refinement, tree: Tree, model: nn.Module) -> dict[str, float]:
        of_tree, of_model = holdout(refinement, tree.to(refinement.device), model)
        tree.cpu()
        if "accuracy" not in of_tree:
            return {}
        lost = of_model["accuracy"] - of_tree["accuracy"]
        return {"accuracy": of_tree["accuracy"], "accuracy_lost": lost}


def drawing(
    tree: Tree, reached: Tensor, shape: tuple[int, ...], report: Mapping[str, float]
) -> dict[str, Any]:
    """What the page needs to draw a tree.

    Args:
        tree: The tree.
        reached: Mean probability to pass each node, inner ones first, (inner + leaves,).
        shape: Of an input, without the batch.
        report: Numbers that stand beside the drawing.

    Returns:
        JSON: ``depth``, ``shape`` (rows, columns) of the filters, ``inner`` (per node ``filter``,
        whole numbers from -100 to 100 row by row; ``bias``; ``reached``), ``leaves`` (``p``, per cent
        by class; ``reached``), and ``report``.
    """
    filters = (tree.beta[:, None] * tree.filters).detach()
    pictures = filters.view(len(filters), -1, *_sides(shape)).mean(dim=1)
    down = max(1, math.ceil(max(pictures.shape[1:]) / MAX_SIDE))
    if down > 1 and pictures.shape[1] > 1:
        pictures = F.avg_pool2d(pictures[:, None], down, ceil_mode=True)[:, 0]
    largest = pictures.flatten(1).abs().amax(dim=1).clamp_min(1e-12)
    scaled = (100 * pictures / largest[:, None, None]).round().to(torch.int64)
    inner = len(filters)
    bias, share = (tree.beta * tree.bias).tolist(), reached.tolist()
    leaves = (100 * tree.leaves.detach().softmax(dim=1)).round().to(torch.int64).tolist()
    return {
        "depth": tree.depth,
        "shape": list(pictures.shape[1:]),
        "inner": [
            {"filter": scaled[i].flatten().tolist(), "bias": bias[i], "reached": share[i]}
            for i in range(inner)
        ],
        "leaves": [{"p": p, "reached": share[inner + i]} for i, p in enumerate(leaves)],
        "report": dict(report),
    }


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[-2], shape[-1]) if len(shape) > 1 else (1, shape[0] if shape else 1)


def _holds(seeds: Sequence[Seed]) -> list[str]:
    def points(arm: str, score: str) -> float:
        return 100 * sum(seed[arm].get(score, 0.0) for seed in seeds) / len(seeds)

    tree = points("tree", "soft_tree.accuracy")
    out = at_least(
        "over the tree on one site's labels", tree - points("site", "test.accuracy"), 2.0
    )
    out += at_least("over CART", tree - points("cart", "test.accuracy"), 10.0)
    return out + at_least("fidelity %", points("tree", "soft_tree.fidelity"), 90.0)


ROW = Row(
    number=38,
    method="soft_tree",
    claim=(
        "A tree taught by a network does better than the same tree taught by the labels. Here: than "
        "by the labels of one site, which are what a site has without the others; and it says what "
        "the network says of nine samples in ten."
    ),
    control=(
        "the same tree on the labels of one site (133); as information, on 300 of all sites; CART of "
        "the same depth on those"
    ),
    data="D8",
    task="d8",
    sites=tuple(Site(f"site{k}", {"part": k}) for k in range(3)),
    run={
        "task": {"name": "d8"},
        "rounds": 4,
        "init": {"from": "site:site0"},
        "cohort": {"sites": [f"site{k}" for k in range(3)], "quorum": "all", "deadline_s": 900.0},
        "local": {
            "work": {"epochs": 20},
            "batch_size": 32,
            "lr": 0.1,
            "optimizer": {"name": "sgd", "momentum": 0.9},
        },
        "assess": {"every": 1000},  # only the last round
    },
    arms={"tree": {"strategy": [{"name": "soft_tree", "every": 1000}]}},
    holds=_holds,
    reproduced="partly",
    beside=("site", "labels", "cart"),
    scores=("soft_tree.accuracy", "soft_tree.fidelity"),
)
