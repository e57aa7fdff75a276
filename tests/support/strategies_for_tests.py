"""Strategies that are no methods: together they use every feature of the protocol.

Which feature each one is here for stands in its docstring. They pass the same battery as the methods.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from protos.manifest import TILE_ELEMENTS, Placement, Tile
from protos.plan import Plan
from strategies.context import (
    Cohort,
    Draft,
    Memo,
    Moment,
    Refinement,
    SidePayload,
    Step,
    Tensors,
    Update,
)
from strategies.protocol import Family, Need, Strategy
from strategies.task import Task


class OwnNormalisation(Strategy):
    """placement "site" and adopt: normalisation stays home, and a counter is reset at adoption.

    Degenerate case: ``on = False`` shares everything.

    Attributes:
        on: Whether to keep it.
    """

    name: ClassVar[str] = "test_own_normalisation"
    family: ClassVar[Family] = "local"
    summary: ClassVar[str] = "Test: normalisation layers stay at the site."
    degenerate: ClassVar[Mapping[str, Any]] = {"on": False}

    on: bool = True

    def placement(self) -> Mapping[str, Placement]:
        return {"1.*": "site"} if self.on else {}

    def adopt(
        self, base: dict[str, Tensor], state: dict[str, Tensor], plan: Plan
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if not self.on:
            return base, state
        rounds = state.get("rounds", torch.zeros((), dtype=torch.int64)) + 1
        reset = {"1.num_batches_tracked": torch.zeros((), dtype=torch.int64)}
        return {**base, **reset}, {**state, "rounds": rounds}


class FrozenAndShadow(Strategy):
    """build, placement "frozen" and "orchestrator", refine with memo, export.

    A frozen adapter beside the model, and a moving average of the head that lives at the
    orchestrator, follows in refine, and is what gets deployed.

    Degenerate case: ``decay = 1`` adds nothing to the model.

    Attributes:
        decay: Of the moving average, in [0, 1].
    """

    name: ClassVar[str] = "test_frozen_and_shadow"
    family: ClassVar[Family] = "compaction"
    summary: ClassVar[str] = "Test: a moving average at the orchestrator is deployed."
    needs: ClassVar[frozenset[Need]] = frozenset({"orchestrator task"})
    degenerate: ClassVar[Mapping[str, Any]] = {"decay": 1.0}

    decay: float = Field(0.5, ge=0, le=1)

    def build(self, model: nn.Module, task: Task) -> nn.Module:
        if self.decay < 1:
            head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
            model.register_buffer("shadow", head.weight.detach().clone())
            model.register_parameter("anchor", nn.Parameter(torch.ones(3), requires_grad=False))
        return model

    def placement(self) -> Mapping[str, Placement]:
        return {"shadow": "orchestrator"} if self.decay < 1 else {}

    def refine(self, refinement: Refinement) -> dict[str, float]:
        if self.decay == 1:
            return {}
        with torch.no_grad():
            head = [m for m in refinement.model.modules() if isinstance(m, nn.Linear)][-1]
            shadow = refinement.model.get_buffer("shadow")
            shadow.lerp_(head.weight, 1 - self.decay)
        refinement.memo = {"rounds": [*refinement.memo.get("rounds", []), refinement.round]}
        return {"distance": float((head.weight.detach() - shadow).norm())}

    def export(self, model: nn.Module) -> nn.Module:
        if self.decay < 1:
            head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
            with torch.no_grad():
                head.weight.copy_(model.get_buffer("shadow"))
        return model


class FourPayloads(Strategy):
    """Side payloads with all four merge rules; the merged ones come back in the next plan.

    Degenerate case: ``on = False`` sends none.

    Attributes:
        on: Whether to send them.
    """

    name: ClassVar[str] = "test_four_payloads"
    family: ClassVar[Family] = "condensation"
    summary: ClassVar[str] = "Test: class sums, a mean, rows and a number per site."
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "site id"})
    degenerate: ClassVar[Mapping[str, Any]] = {"on": False}

    on: bool = True

    def encode(
        self, update: Update, plan: Plan, state: dict[str, Tensor]
    ) -> tuple[Update, dict[str, Tensor]]:
        if not self.on or update.task is None:
            return update, state
        inputs, targets = update.task.train_data().tensors  # type: ignore[attr-defined]
        sums = torch.zeros(3, inputs.shape[1] + 1, dtype=torch.float64)
        sums.index_add_(0, targets, torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double())
        chosen = torch.randint(len(inputs), (2,), generator=update.generator)
        own: dict[str, SidePayload] = {
            "class_sums": SidePayload(sums, "sum"),
            "mean": SidePayload(inputs.double().mean(dim=0), "mean by count"),
            "rows": SidePayload(inputs[chosen], "concatenate"),
            "examples": SidePayload(torch.tensor([float(len(inputs))]), "keep per site"),
        }
        update.payloads |= {f"{self.name}/{key}": value for key, value in own.items()}
        return update, state

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        merged = draft.last.payloads.get(f"{self.name}/class_sums")
        if not self.on or merged is None:
            return draft, memo
        centres = merged[:, :-1] / merged[:, -1:]
        payload = {**draft.payload, self.name: {"centres": centres.tolist()}}
        return draft.but(payload=payload), {**memo, "of": draft.last.round}


class ByGroup(Strategy):
    """groups and weigh (n, groups): the head follows one site, nobody speaks for the group "idle".

    Degenerate case: ``on = False`` weighs everything alike.

    Attributes:
        on: Whether to weigh by group.
    """

    name: ClassVar[str] = "test_by_group"
    family: ClassVar[Family] = "averaging"
    summary: ClassVar[str] = "Test: another weight for each group of tensors."
    degenerate: ClassVar[Mapping[str, Any]] = {"on": False}

    on: bool = True

    def groups(self) -> Mapping[str, str]:
        return {"2.*weight": "head", "2.*bias": "idle"} if self.on else {}

    def weigh(self, weights: Tensor, cohort: Cohort) -> Tensor:
        if not self.on:
            return weights
        out = weights[:, None].repeat(1, len(cohort.groups))
        out[1:, cohort.groups.index("head")] = 0
        out[:, cohort.groups.index("idle")] = 0
        return out


class CloseOnes(Strategy):
    """needs norms and gram, and absolute_weights: nobody moves the model farther than ``limit``.

    Degenerate case: ``limit = None`` leaves the weights as they are.

    Attributes:
        limit: Largest norm of an update; a longer one is weighed down to it.
    """

    name: ClassVar[str] = "test_close_ones"
    family: ClassVar[Family] = "robust"
    summary: ClassVar[str] = "Test: long updates weigh less, and so do lonely ones."
    needs: ClassVar[frozenset[Need]] = frozenset({"norms", "gram", "individual updates"})
    degenerate: ClassVar[Mapping[str, Any]] = {"limit": None}
    absolute_weights: ClassVar[bool] = True

    limit: float | None = Field(0.1, gt=0)

    def weigh(self, weights: Tensor, cohort: Cohort) -> Tensor:
        if self.limit is None:
            return weights
        assert cohort.norms is not None
        assert cohort.gram is not None
        cosine = cohort.gram / (cohort.norms[:, None] * cohort.norms[None, :])
        friends = (cosine > 0).sum(dim=1) / len(cohort.sites)
        return weights * friends * (self.limit / cohort.norms).clamp(max=1)


class TwoOptimizers(Strategy):
    """local_step and scratch: body and head take turns, each with an optimizer of its own.

    Degenerate case: ``on = False`` is the ordinary step, written out.

    Attributes:
        on: Whether they take turns.
    """

    name: ClassVar[str] = "test_two_optimizers"
    family: ClassVar[Family] = "architectures"
    summary: ClassVar[str] = "Test: two optimizers take turns."
    needs: ClassVar[frozenset[Need]] = frozenset({"our training loop"})
    degenerate: ClassVar[Mapping[str, Any]] = {"on": False}

    on: bool = True

    def local_step(self, step: Step, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        optimizers = [step.optimizer]
        if self.on:
            key = f"{self.name}.optimizers"
            if key not in step.scratch:
                linear = [m for m in step.model.modules() if isinstance(m, nn.Linear)]
                step.scratch[key] = [
                    torch.optim.Adam(linear[0].parameters(), lr=step.learning_rate),
                    torch.optim.SGD(linear[-1].parameters(), lr=step.learning_rate),
                ]
            optimizers = [step.scratch[key][step.index % 2]]
        step.outputs = step.task.forward(step.model, step.inputs)
        loss = step.task.loss(step.outputs, step.targets)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.detach(), state


class SmallOnesVanish(Strategy):
    """batch (with the step's generator), after_step and site state that counts.

    Degenerate case: ``below = 0, noise = 0``.

    Attributes:
        below: Weights that are smaller become zero after each step.
        noise: Standard deviation of noise on the inputs.
    """

    name: ClassVar[str] = "test_small_ones_vanish"
    family: ClassVar[Family] = "augmentation"
    summary: ClassVar[str] = "Test: noise on inputs, and small weights are cut after each step."
    degenerate: ClassVar[Mapping[str, Any]] = {"below": 0.0, "noise": 0.0}

    below: float = Field(0.02, ge=0)
    noise: float = Field(0.1, ge=0)

    def batch(self, step: Step) -> None:
        if self.noise:
            drawn = torch.randn(step.inputs.shape, generator=step.generator)
            step.inputs = step.inputs + self.noise * drawn

    def after_step(self, step: Step, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.below:
            return state
        cut = torch.zeros((), dtype=torch.int64)
        with torch.no_grad():
            for parameter in step.model.parameters():
                small = parameter.abs() < self.below
                parameter.masked_fill_(small, 0.0)
                cut = cut + small.sum()
        return {"cut": state.get("cut", torch.zeros((), dtype=torch.int64)) + cut}


class HalfPrecision(Strategy):
    """The wire codec: one block a tile, decode, and a residual as site state (error feedback).

    Degenerate case: ``half = False`` sends the same numbers in blocks of fp32.

    Attributes:
        half: Whether to round to fp16.
    """

    name: ClassVar[str] = "test_half_precision"
    family: ClassVar[Family] = "compression"
    summary: ClassVar[str] = "Test: updates in fp16, with what was lost added to the next one."
    degenerate: ClassVar[Mapping[str, Any]] = {"half": False}
    wire_codec: ClassVar[bool] = True

    half: bool = True

    def encode(
        self, update: Update, plan: Plan, state: dict[str, Tensor]
    ) -> tuple[Update, dict[str, Tensor]]:
        update.blocks, residual = {}, {}
        for name, tensor in update.tensors.items():
            if name in dict(update.model.named_parameters()) if update.model else True:
                exact = tensor.flatten() + state[name] if name in state else tensor.flatten()
                sent = exact.half() if self.half else exact
                if self.half:
                    residual[name] = exact - sent.float()
                update.blocks[name] = [
                    struct.pack("<?I", self.half, len(part)) + part.contiguous().numpy().tobytes()
                    for part in sent.split(TILE_ELEMENTS)
                ]
        return update, residual

    def decode(self, block: bytes, tile: Tile) -> Tensor:
        head = struct.calcsize("<?I")
        if len(block) < head:
            raise ValueError("block without a head")
        half, elements = struct.unpack("<?I", block[:head])
        dtype = torch.float16 if half else torch.float32
        if elements != tile.elements or len(block) != head + elements * dtype.itemsize:
            raise ValueError("block of the wrong length")
        if not elements:
            return torch.zeros(0)
        return torch.frombuffer(bytearray(block[head:]), dtype=dtype).float()


class OuterNoise(Strategy):
    """step with noise from the moment's generator, and outer state that adds it up.

    Degenerate case: ``deviation = 0``.

    Attributes:
        deviation: Standard deviation of the noise; divided by the number of sites.
    """

    name: ClassVar[str] = "test_outer_noise"
    family: ClassVar[Family] = "privacy"
    summary: ClassVar[str] = "Test: noise on the reduced update."
    degenerate: ClassVar[Mapping[str, Any]] = {"deviation": 0.0}

    deviation: float = Field(0.01, ge=0)

    def init_state(self, tile: Tile) -> dict[str, Tensor]:
        return {"total": torch.zeros(tile.elements)}

    def step(
        self, delta: Tensor, base: Tensor, state: dict[str, Tensor], tile: Tile, moment: Moment
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.deviation:
            return delta, state
        drawn = torch.randn(tile.elements, generator=moment.generator(self.name, tile))
        noise = self.deviation / moment.sites * drawn
        return delta + noise.to(delta.dtype), {"total": state["total"] + noise}


class Disagreement(Strategy):
    """init_memo, and evaluate as sums that the report adds up; has a need of the embedding.

    Degenerate case: it changes nothing.

    Attributes:
        classes: Of the task.
    """

    name: ClassVar[str] = "test_disagreement"
    family: ClassVar[Family] = "labels"
    summary: ClassVar[str] = "Test: a confusion matrix as sums."
    needs: ClassVar[frozenset[Need]] = frozenset({"labels", "logits", "val data", "embedding"})
    degenerate: ClassVar[Mapping[str, Any]] = {}

    classes: int = Field(3, ge=2)

    def init_memo(self) -> Memo:
        return {"plans": 0}

    def plan(self, draft: Draft, memo: Memo) -> tuple[Draft, Memo]:
        return draft, {"plans": draft.round}

    def evaluate(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        at = targets * self.classes + outputs.argmax(dim=1)
        counts = torch.bincount(at, minlength=self.classes**2).double()
        return {"confusion": counts.reshape(self.classes, self.classes)}

    def report(self, sums: Tensors) -> float:
        confusion = sums["confusion"]
        return float(confusion.diagonal().sum() / confusion.sum())


ALL: tuple[type[Strategy], ...] = (
    OwnNormalisation,
    FrozenAndShadow,
    FourPayloads,
    ByGroup,
    CloseOnes,
    TwoOptimizers,
    SmallOnesVanish,
    HalfPrecision,
    OuterNoise,
    Disagreement,
)
