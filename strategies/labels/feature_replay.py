"""Feature replay: what the head forgets of a class is told to it again, in features and not in data."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from protos.errors import TaskFailed
from protos.plan import Plan
from strategies import scores
from strategies.context import Refinement, SidePayload, Update, seeded
from strategies.labels.alife import cayley, head_of, rotation_loss
from strategies.protocol import Family, Need, Strategy
from strategies.task import Task

BATCH = 256
SEEN = 4096
"""Samples that a site looks at for its features, at most."""


class FeatureReplay(Strategy):
    r"""The second half of ALIFE: stored features, carried to a new extractor by learnt rotations.

    The average of the sites' extractors is nobody's: no site can say what its samples look like to
    it. So a site sends, of each class, some features f by the extractor that all sites have, the
    base's, and for each class a rotation R_c that carries them to its own new one::

        R_c = (I - S_c)(I + S_c)^-1,   S_c = (B_c - B_c^T) / 2
        B_c minimises  (1 - share) CE(head(R_c r + m'), c) + share (1 - cos(R_c r, r'))

    with r and r' the mean features of class c by the old and the new extractor, centred over the
    classes, and m' the mean that was subtracted from r'. The orchestrator averages B_c over the
    sites by their samples of the class, carries all features over, and trains the head of the
    averaged model on them, the rest of it frozen::

        loss = replay * CE(old classes) + focal CE(new classes),   focal: (1 - p_y)^2 (-log p_y)

    A site names the class of a sample by its label, or, for background, by what the base believes.

    **Features are made of single samples**, and may tell much about them: `memory` is how many leave
    each site for each class and round, beside d x d numbers for each class. A site's policy has the
    last word on them (``side_payloads``, merge rule "concatenate").

    Degenerate case: ``memory = 0`` sends and changes nothing.

    Departures: the paper's memory holds features of classes whose pictures are gone; here sites
    make them anew each round, of what the base recognises. It has no federation: one extractor
    follows another, where here the average follows the base. Representations are plain means over
    a site's samples, not weighted by their likeness to the memory. The head is trained without
    pictures, hence without ALI. Rotations are averaged before the Cayley map.

    Attributes:
        memory: Features for each class that leave a site in a round, >= 0.
        background: The label of what is not labelled.
        new: Outputs, the last ones, whose classes are new.
        share: lambda, in [0, 1]; the paper has 0.99, and 0.95 for VOC 15-5 and 19-1.
        rotation_steps: Steps of Adam with rate 0.01 for the rotations.
        replay: Weight of old classes, >= 0; 10 in the paper.
        steps: Steps of the head.
        learning_rate: Of the head, with Nesterov's momentum 0.9.
        head: Name of the layer that gives the logits; empty: the last linear one.
    """

    name: ClassVar[str] = "feature_replay"
    family: ClassVar[Family] = "labels"
    summary: ClassVar[str] = "Rotated features of single samples keep the averaged head in shape."
    paper: ClassVar[str] = (
        "Oh, Baek, Ham: ALIFE: Adaptive Logit Regularizer and Feature Replay for Incremental "
        "Semantic Segmentation, NeurIPS 2022, arXiv:2210.06816"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "orchestrator task"})
    degenerate: ClassVar[Mapping[str, Any]] = {"memory": 0}

    memory: int = Field(20, ge=0, le=10_000)
    background: int = Field(0, ge=0)
    new: int = Field(1, ge=0)
    share: float = Field(0.99, ge=0, le=1)
    rotation_steps: int = Field(100, ge=0)
    replay: float = Field(10.0, ge=0)
    steps: int = Field(100, ge=0)
    learning_rate: float = Field(1e-3, gt=0)
    head: str = ""

    def encode(
        self, update: Update, plan: Plan, state: dict[str, Tensor]
    ) -> tuple[Update, dict[str, Tensor]]:
        """Add features, rotations and what belongs to them."""
        if self.memory == 0:
            return update, state
        if update.model is None or update.task is None or update.generator is None:
            raise LookupError("this update has no model")
        before = copy.deepcopy(update.model)
        with torch.no_grad():
            own = dict(before.named_parameters())
            for name in update.parameters:
                own[name].add_(update.tensors[name].to(own[name]))  # base = local + (base - local)
        seen = self._look(before, update.model, update.task)
        classes, d = seen.logits, seen.before.shape[1]
        counts = torch.bincount(seen.label, minlength=classes)
        order = torch.randperm(len(seen.label), generator=update.generator)
        chosen = [order[seen.label[order] == c][: self.memory] for c in range(classes)]
        kept = torch.cat(chosen)
        with torch.enable_grad():
            head = head_of(update.model, self.head, self.name)[1]
            b = self._rotations(seen, counts, copy.deepcopy(head).cpu())
        rows = torch.cat([seen.label[kept, None].float(), seen.before[kept]], dim=1)
        payloads = {
            "features": SidePayload(rows.reshape(-1, 1 + d), "concatenate"),
            "rotations": SidePayload(b.double() * counts[:, None, None]),
            "counts": SidePayload(counts.double()),
            "sums": SidePayload(torch.stack([totals(seen.before, seen), totals(seen.now, seen)])),
        }
        update.payloads |= {f"{self.name}/{key}": value for key, value in payloads.items()}
        return update, state

    def _look(self, before: nn.Module, now: nn.Module, task: Task) -> Seen:
        labels, old, new = [], [], []
        width = 0
        with torch.no_grad():
            for inputs, targets in _batches(task, next(now.parameters()).device):
                logits, f = features(before, task, inputs, self.head, self.name)
                _, g = features(now, task, inputs, self.head, self.name)
                z, truth = scores.flatten(logits, targets)
                width = z.shape[1]
                believed = z.argmax(dim=1)
                unlabelled = truth == self.background
                named = ~unlabelled | (believed < width - self.new)
                labels.append(torch.where(unlabelled, believed, truth)[named].cpu())
                old.append(f[named].float().cpu())
                new.append(g[named].float().cpu())
        return Seen(torch.cat(labels), torch.cat(old), torch.cat(new), width)

    def _rotations(self, seen: Seen, counts: Tensor, head: nn.Module) -> Tensor:
        d = seen.before.shape[1]
        b = torch.zeros(seen.logits, d, d, requires_grad=True)
        there = counts.nonzero().squeeze(1)
        if len(there) == 0:
            return b.detach()
        r, _ = _centred(seen.before, seen.label, there)
        r_now, centre = _centred(seen.now, seen.label, there)
        head.requires_grad_(False)
        optimizer = torch.optim.Adam([b], lr=1e-2)
        for _ in range(self.rotation_steps):
            carried = (cayley(b[there]) @ r[..., None]).squeeze(-1) + centre
            loss = rotation_loss(b[there], r, r_now, head(carried), there, self.share).sum()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return b.detach()

    def refine(self, refinement: Refinement) -> dict[str, float]:
        """Train the head of the average on the carried features.

        Returns:
            How many there are, and what share of them the head had right before and after.
        """
        found = {k.removeprefix(f"{self.name}/"): v for k, v in refinement.payloads.items()}
        if self.memory == 0 or "features" not in found or not len(found["features"]):
            return {}
        label = found["features"][:, 0].long()
        carried = carry(found, label)
        _, head = head_of(refinement.model, self.head, self.name)
        head = head.cpu()
        before = _right(head, carried, label)
        optimizer = torch.optim.SGD(
            head.parameters(), lr=self.learning_rate, momentum=0.9, nesterov=True
        )
        order = seeded(refinement.seed, refinement.round, self.name)
        fresh = label >= len(found["counts"]) - self.new
        for _ in range(self.steps):
            rows = torch.randint(len(label), (min(BATCH, len(label)),), generator=order)
            entropy = F.cross_entropy(head(carried[rows]), label[rows], reduction="none")
            focal = (1 - torch.exp(-entropy)).square() * entropy
            loss = torch.where(fresh[rows], focal, self.replay * entropy).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        report = {"features": float(len(label)), "right_before": before}
        return {**report, "right_after": _right(head, carried, label)}


class Seen(NamedTuple):
    """A site's samples: class, features by the old and the new extractor; how many logits."""

    label: Tensor
    before: Tensor
    now: Tensor
    logits: int


def totals(values: Tensor, seen: Seen) -> Tensor:
    """Sums of some features over each class, (logits, d) float64: those of sites add up."""
    out = torch.zeros(seen.logits, values.shape[1], dtype=torch.float64)
    return out.index_add_(0, seen.label, values.double())


def carry(found: Mapping[str, Tensor], label: Tensor) -> Tensor:
    """The features of merged payloads, each by the mean rotation of its class."""
    counts = found["counts"]
    b = found["rotations"] / counts.clamp_min(1)[:, None, None]
    there = counts > 0
    means = found["sums"][:, there] / counts[there][:, None]
    old, new = means.mean(dim=1).float()
    rotation = cayley(b).float()
    out = torch.empty_like(found["features"][:, 1:])
    for c in sorted(set(label.tolist())):
        rows = label == c
        out[rows] = (found["features"][rows, 1:] - old) @ rotation[c].mT + new
    return out


def features(
    model: nn.Module, task: Task, inputs: Any, head: str, strategy: str
) -> tuple[Tensor, Tensor]:
    """A model's outputs, and what goes into its head, (samples, d)."""
    caught: list[Tensor] = []
    _, layer = head_of(model, head, strategy)
    handle = layer.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    try:
        outputs = task.forward(model, inputs)
    finally:
        handle.remove()
    if len(caught) != 1 or caught[0].dim() != 2:
        raise TaskFailed(
            f"strategy {strategy}: the head is asked {len(caught)} times for a batch, or not for one "
            "vector a sample; name another layer as head",
            strategy=strategy,
        )
    return outputs, caught[0]


def _batches(task: Task, device: torch.device) -> Iterator[tuple[Any, Tensor]]:
    seen = 0
    for batch in DataLoader(task.train_data(), batch_size=BATCH, collate_fn=task.collate):
        inputs, targets = task.unpack(batch)
        yield inputs.to(device), targets.to(device)
        seen += len(targets)
        if seen >= SEEN:
            return


def _means(values: Tensor, label: Tensor, there: Tensor) -> Tensor:
    return torch.stack([values[label == c].mean(dim=0) for c in there.tolist()])


def _centred(values: Tensor, label: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """The means of classes without what they have in common, and that."""
    means = _means(values, label, there)
    return means - means.mean(dim=0), means.mean(dim=0)


def _right(head: nn.Module, carried: Tensor, label: Tensor) -> float:
    with torch.no_grad():
        return float((head(carried).argmax(dim=1) == label).double().mean())
