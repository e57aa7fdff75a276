"""A stack: the strategies of a run, in the order of its file, acting as one.

Phases: a strategy with ``rounds = [a, b)`` acts in those rounds only. `Stack.plan` looks at them by
itself; everything else is asked of the stack of the round, ``Stack(stack.active(round))``, which
carries the state of strategies that it does not hold through unchanged. A strategy that decides the
manifest (build, placement, groups) can't have a phase: the manifest is one for the whole run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from protos.errors import ComputeFailed, ConfigInvalid
from protos.manifest import Manifest, Tile
from protos.plan import Plan, StrategyChoice
from strategies.context import Calibration, Cohort, Draft, Memo, Moment, Step, Tensors, Update
from strategies.manifest import describe
from strategies.needs import AT_BOTH_ENDS, check_needs
from strategies.protocol import Strategy
from strategies.registry import make
from strategies.task import Task

State = dict[str, dict[str, Tensor]]
"""Strategy name to its state."""


class Stack:
    """Strategies that act as one.

    Args:
        choices: Names, hyperparameters and phases, in order.

    Raises:
        ConfigInvalid: A name is unknown, a hyperparameter is wrong, a strategy stands twice, or two
            of them claim what only one may own (reduce, the loss, wire codec, calibration map),
            one reads labels that another blends, one adds to a loss where another owns the whole
            step, or one that changes the model has a phase.
    """

    def __init__(self, choices: Sequence[StrategyChoice]) -> None:
        self.choices = tuple(choices)
        self.strategies: tuple[Strategy, ...] = tuple(make(c.name, c.params) for c in choices)
        names = [s.name for s in self.strategies]
        for name in names:
            if names.count(name) > 1:
                raise ConfigInvalid(f"strategy: {name} stands twice", key="strategy", name=name)
        for what, owners in (
            ("reduce", self._owners("reduce")),
            # Who owns the step has its own losses: beside it, another's would never be asked.
            ("the loss", [s.name for s in self.strategies if owns_loss(type(s))]),
            ("a calibration map", [s.name for s in self.mapping]),
            ("a wire codec", [s.name for s in self.strategies if s.wire_codec]),
        ):
            if len(owners) > 1:
                raise ConfigInvalid(
                    f"strategy: only one may own {what}, but {' and '.join(owners)} do; remove one",
                    key="strategy",
                )
        for blender in (s.name for s in self.strategies if s.blends_labels):
            readers = [s.name for s in self.strategies if trains_on_labels(type(s))]
            if readers:
                raise ConfigInvalid(
                    f"strategy: {blender} blends the labels that {' and '.join(readers)} would read; "
                    "remove one",
                    key="strategy",
                )
        stepper = self.owner("local_step")
        for other in self.having("objective") if stepper is not None else ():
            if stepper is not None and other is not stepper:
                raise ConfigInvalid(
                    f"strategy: {stepper.name} owns the whole training step, so what {other.name} "
                    "would add to the loss would never be asked for; remove one",
                    key="strategy",
                )
        for choice, strategy in zip(self.choices, self.strategies, strict=True):
            structural = [h for h in ("build", "placement", "groups") if strategy.overrides(h)]
            if choice.rounds is not None and structural:
                raise ConfigInvalid(
                    f"strategy {choice.name}: it decides which tensors the model has "
                    f"({', '.join(structural)}), so it can't be switched on and off; remove rounds",
                    key=f"strategy.{choice.name}.rounds",
                )

    def _owners(self, hook: str) -> list[str]:
        return [s.name for s in self.having(hook)]

    def having(self, hook: str) -> tuple[Strategy, ...]:
        """The strategies that have a hook of their own, in order."""
        return tuple(s for s in self.strategies if s.overrides(hook))

    def active(self, round: int) -> tuple[StrategyChoice, ...]:
        """The choices whose phase ``rounds = [a, b)`` holds this round."""
        out = []
        for choice in self.choices:
            first, end = choice.rounds or (0, None)
            if round >= first and (end is None or round < end):
                out.append(choice)
        return tuple(out)

    @property
    def needs(self) -> frozenset[str]:
        """The union of what the strategies need."""
        return frozenset[str]().union(*(s.needed for s in self.strategies))

    def owner(self, hook: str) -> Strategy | None:
        """The one strategy that has a hook which only one may own."""
        return next((s for s in self.strategies if s.overrides(hook)), None)

    @property
    def mapping(self) -> tuple[Strategy, ...]:
        """What fits a map that changes outputs: one at most."""
        return tuple(s for s in self.having("calibrate") if not s.overrides("rate"))

    @property
    def rating(self) -> tuple[Strategy, ...]:
        """What looks at outputs after that map, and changes none."""
        return self.having("rate")

    @cached_property
    def codec(self) -> Strategy | None:
        """The wire codec, if there is one."""
        return next((s for s in self.strategies if s.wire_codec), None)

    # -- plan -------------------------------------------------------------------------------

    def plan(self, draft: Draft, memos: Mapping[str, Memo]) -> tuple[Draft, dict[str, Memo]]:
        """The ``plan`` hooks of the strategies that act in the round, in order.

        Gives the draft and the next memos; the memo of a strategy out of its phase stays.
        """
        out = dict(memos)
        acting = {choice.name for choice in self.active(draft.round)}
        for strategy in self.strategies:
            if strategy.name not in acting:
                continue
            memo = dict(memos.get(strategy.name) or strategy.init_memo())
            draft, out[strategy.name] = strategy.plan(draft, memo)
        return draft, out

    # -- model --------------------------------------------------------------------------------

    def build(self, task: Task, model: nn.Module | None = None) -> nn.Module:
        """The task's model after all ``build`` hooks.

        Args:
            task: The task.
            model: One of its models, to be changed; by default a new one.

        Raises:
            ConfigInvalid: A strategy needs what the task does not have.
        """
        check_needs(self.strategies, task, AT_BOTH_ENDS)
        model = task.model() if model is None else model
        for strategy in self.strategies:
            model = strategy.build(model, task)
        return model

    def manifest(self, model: nn.Module, task: Task) -> Manifest:
        """The manifest of a built model: kinds, groups, placements, ties."""
        patterns: list[tuple[str, str]] = list(task.placement().items())
        groups: list[tuple[str, str]] = []
        for strategy in self.strategies:
            patterns += list(strategy.placement().items())
            groups += list(strategy.groups().items())
        return describe(model, patterns, groups)

    # -- site -----------------------------------------------------------------------------------

    def adopt(
        self, base: dict[str, Tensor], state: State, plan: Plan
    ) -> tuple[dict[str, Tensor], State]:
        """All ``adopt`` hooks in order."""
        out: State = dict(state)
        for s in self.strategies:
            base, out[s.name] = s.adopt(base, state.get(s.name, {}), plan)
        return base, out

    def batch(self, step: Step) -> None:
        """All ``batch`` hooks in order."""
        for s in self.strategies:
            s.batch(step)

    def loss(self, step: Step) -> Tensor:
        """The loss of the one strategy that owns it, or the task's."""
        owner = self.owner("loss")
        return step.task.loss(step.outputs, step.targets) if owner is None else owner.loss(step)

    def objective(self, loss: Tensor, step: Step, state: State) -> Tensor:
        """All ``objective`` hooks in order."""
        for s in self.strategies:
            loss = s.objective(loss, step, state.get(s.name, {}))
        return loss

    def after_step(self, step: Step, state: State) -> State:
        """All ``after_step`` hooks in order."""
        own = {s.name: s.after_step(step, state.get(s.name, {})) for s in self.strategies}
        return {**state, **own}

    def local_step(self, step: Step, state: State) -> tuple[Tensor, State]:
        """The step of the one strategy that owns it (see ``owner``)."""
        owner = self.having("local_step")[0]
        loss, own = owner.local_step(step, state.get(owner.name, {}))
        return loss, {**state, owner.name: own}

    def encode(self, update: Update, plan: Plan, state: State) -> tuple[Update, State]:
        """All ``encode`` hooks in order."""
        out: State = dict(state)
        for s in self.strategies:
            update, out[s.name] = s.encode(update, plan, state.get(s.name, {}))
        return update, out

    # -- reduction --------------------------------------------------------------------------------

    def init_state(self, tile: Tile) -> dict[str, Tensor]:
        """Outer state of a tile, keys "strategy.key"."""
        return {
            f"{s.name}.{key}": value
            for s in self.strategies
            for key, value in s.init_state(tile).items()
        }

    def decode(self, block: bytes, tile: Tile) -> Tensor:
        """A tile of a contribution from the bytes of the wire codec, (elements,)."""
        codec = self.codec
        if codec is None:
            raise ConfigInvalid("strategy: this stack has no wire codec", key="strategy")
        return codec.decode(block, tile)

    def weigh(self, cohort: Cohort) -> Tensor:
        """All ``weigh`` hooks in order, from the example counts: (n, groups) float64.

        Work that is s models old starts from examples / sqrt(1 + s).

        A column sums to one, unless a strategy says ``absolute_weights``, or to zero where no site
        has anything to say about the group (its tensors then stay as they are).

        Raises:
            ComputeFailed: A weight is negative or not finite, or their shape is wrong.
        """
        n, width = len(cohort.sites), len(cohort.groups)
        fresh = 1 / (1 + cohort.staleness).to(torch.float64).sqrt()
        counts = cohort.examples * fresh
        total = counts.sum()
        start = counts / total if total > 0 else fresh / fresh.sum()
        columns = start.to(torch.float64)[:, None].expand(n, width).clone()
        for s in self.having("weigh"):
            given = [s.weigh(columns[:, g].clone(), cohort) for g in range(width)]
            given = [w[:, g] if w.ndim == 2 else w for g, w in enumerate(given)]
            if any(w.shape != (n,) or not bool((w >= 0).all() & w.isfinite().all()) for w in given):
                raise ComputeFailed(
                    f"strategy {s.name}: weights must be {n} finite numbers >= 0 for each group",
                    strategy=s.name,
                )
            columns = torch.stack(given, dim=1).to(torch.float64)
        if any(s.absolute_weights for s in self.strategies):
            return columns
        sums = columns.sum(dim=0)
        return columns / torch.where(sums > 0, sums, torch.ones_like(sums))

    def reduce(self, stack: Tensor, weights: Tensor, tile: Tile) -> Tensor:
        """(n, elements), (n,) -> (elements,): the rule that a strategy owns, or the weighted mean."""
        owner = self.owner("reduce")
        return (
            weighted_mean(stack, weights) if owner is None else owner.reduce(stack, weights, tile)
        )

    def step(
        self,
        delta: Tensor,
        base: Tensor,
        state: Mapping[str, Tensor],
        tile: Tile,
        moment: Moment,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All ``step`` hooks in order; state keys are "strategy.key"."""
        out: dict[str, Tensor] = dict(state)
        for s in self.strategies:
            own = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{s.name}.")}
            delta, own = s.step(delta, base, own, tile, moment)
            out.update({f"{s.name}.{k}": v for k, v in own.items()})
        return delta, out

    # -- assess and export --------------------------------------------------------------------------

    def evaluate(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The ``evaluate`` hooks that see outputs as they are: sums by "strategy/key"."""
        return {
            f"{s.name}/{key}": value
            for s in self.strategies
            if not s.overrides("rate")
            for key, value in s.evaluate(outputs, targets).items()
        }

    def observe(self, outputs: Tensor, targets: Tensor, split: str) -> dict[str, Tensor]:
        """The ``evaluate`` hooks that see outputs after the map: sums by "strategy/split/key"."""
        return {
            f"{s.name}/{split}/{key}": value
            for s in self.rating
            for key, value in s.evaluate(outputs, targets).items()
        }

    def release(self, sums: Tensors) -> Tensors:
        """All ``release`` hooks in order."""
        for s in self.strategies:
            sums = s.release(sums)
        return sums

    def calibrate(self, sums: Tensors, sites: int = 1) -> dict[str, Calibration]:
        """The map of the one strategy that changes outputs, by its name; empty for none."""
        return _fitted(self.mapping, sums, "", sites)

    def settle(self, sums: Tensors, sites: int = 1) -> dict[str, Calibration]:
        """The maps of those that look at outputs after it, from what they observed over val."""
        return _fitted(self.rating, sums, "val/", sites)

    def rate(self, sums: Tensors, maps: Mapping[str, Memo]) -> dict[str, float]:
        """Scores of what was observed, by "split.name"; of one site, or of the union."""
        out = {}
        for s in self.rating:
            for split in ("val", "test"):
                own = _own(sums, f"{s.name}/{split}/")
                if own and s.name in maps:
                    found = s.rate(own, maps[s.name])
                    out.update({f"{split}.{key}": value for key, value in found.items()})
        return out

    def transform(self, outputs: Tensor, parameters: Mapping[str, Memo]) -> Tensor:
        """Outputs after the calibration map; ``parameters`` by strategy name."""
        for s in self.having("transform"):
            if s.name in parameters:
                outputs = s.transform(outputs, parameters[s.name])
        return outputs

    def export(self, model: nn.Module) -> nn.Module:
        """All ``export`` hooks in order."""
        for s in self.strategies:
            model = s.export(model)
        return model


def owns_loss(strategy: type[Strategy]) -> bool:
    """Whether a strategy decides by itself what is minimised on a batch."""
    return strategy.overrides("loss") or strategy.overrides("local_step")


def trains_on_labels(strategy: type[Strategy]) -> bool:
    """Whether a strategy reads class labels in a training step."""
    hooks = ("batch", "loss", "objective", "after_step", "local_step")
    return "labels" in strategy.needs and any(strategy.overrides(h) for h in hooks)


def _own(sums: Tensors, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in sums.items() if k.startswith(prefix)}


def _fitted(
    strategies: Iterable[Strategy], sums: Tensors, split: str, sites: int
) -> dict[str, Calibration]:
    out = {}
    for s in strategies:
        own = _own(sums, f"{s.name}/{split}")
        fitted = s.calibrate(own | {"sites": torch.tensor(float(sites))}) if own else None
        if fitted is not None:
            out[s.name] = fitted
    return out


def weighted_mean(rows: Iterable[Tensor], weights: Tensor, out: Tensor | None = None) -> Tensor:
    """N rows of (elements,), (n,) float64 summing to one -> (elements,) float64.

    Added in the order of the rows, which may share memory if they are made one after the other.

    Args:
        rows: A tensor (n, elements), or anything that gives its rows.
        weights: One for each row.
        out: Where the mean is built, float64; fresh memory by default.
    """
    for number, (row, weight) in enumerate(zip(rows, weights.tolist(), strict=True)):
        if out is None:
            out = torch.empty(row.shape, dtype=torch.float64)
        if number == 0:
            out.zero_()
        out.add_(row, alpha=weight)
    if out is None:
        raise ValueError("the mean of no rows")
    return out
