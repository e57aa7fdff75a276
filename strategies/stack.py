"""A stack: the strategies of a run, in the order of its file, acting as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from protos.errors import ConfigInvalid
from protos.manifest import Kind, Manifest, Placement, TensorSpec, Tile
from protos.plan import Plan, StrategyChoice
from strategies.protocol import Draft, Memo, Step, Strategy, Update
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
            of them claim what only one may own (reduce, local_step, wire codec).
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
            ("local_step", self._owners("local_step")),
            ("a wire codec", [s.name for s in self.strategies if s.wire_codec]),
        ):
            if len(owners) > 1:
                raise ConfigInvalid(
                    f"strategy: only one may own {what}, but {' and '.join(owners)} do; remove one",
                    key="strategy",
                )

    def _owners(self, hook: str) -> list[str]:
        return [s.name for s in self.strategies if s.overrides(hook)]

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
        return frozenset[str]().union(*(s.needs for s in self.strategies))

    def owner(self, hook: str) -> Strategy | None:
        """The one strategy that has a hook which only one may own."""
        return next((s for s in self.strategies if s.overrides(hook)), None)

    @cached_property
    def codec(self) -> Strategy | None:
        """The wire codec, if there is one."""
        return next((s for s in self.strategies if s.wire_codec), None)

    # -- plan -------------------------------------------------------------------------------

    def plan(self, draft: Draft, memos: Mapping[str, Memo]) -> tuple[Draft, dict[str, Memo]]:
        """All ``plan`` hooks in order; gives the draft and the next memos."""
        out = {}
        for strategy in self.strategies:
            memo = dict(memos.get(strategy.name) or strategy.init_memo())
            draft, out[strategy.name] = strategy.plan(draft, memo)
        return draft, out

    # -- model --------------------------------------------------------------------------------

    def build(self, task: Task) -> nn.Module:
        """The task's model after all ``build`` hooks."""
        model = task.model()
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
        out: State = {}
        for s in self.strategies:
            base, out[s.name] = s.adopt(base, state.get(s.name, {}), plan)
        return base, out

    def batch(self, step: Step) -> None:
        """All ``batch`` hooks in order."""
        for s in self.strategies:
            s.batch(step)

    def objective(self, loss: Tensor, step: Step, state: State) -> Tensor:
        """All ``objective`` hooks in order."""
        for s in self.strategies:
            loss = s.objective(loss, step, state.get(s.name, {}))
        return loss

    def after_step(self, step: Step, state: State) -> State:
        """All ``after_step`` hooks in order."""
        return {s.name: s.after_step(step, state.get(s.name, {})) for s in self.strategies}

    def encode(self, update: Update, plan: Plan, state: State) -> tuple[Update, State]:
        """All ``encode`` hooks in order."""
        out: State = {}
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

    def step(
        self, delta: Tensor, base: Tensor, state: Mapping[str, Tensor], tile: Tile
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """All ``step`` hooks in order; state keys are "strategy.key"."""
        out: dict[str, Tensor] = {}
        for s in self.strategies:
            own = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{s.name}.")}
            delta, own = s.step(delta, base, own, tile)
            out.update({f"{s.name}.{k}": v for k, v in own.items()})
        return delta, out


def describe(
    model: nn.Module, placements: Sequence[tuple[str, str]], groups: Sequence[tuple[str, str]]
) -> Manifest:
    """The manifest of a model; the last matching pattern wins.

    Parameters that require no gradient are ``frozen`` unless a pattern says otherwise. Tied
    tensors appear once, under the first of their names.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    ties: dict[str, list[str]] = {}
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            continue  # extra state of a module: not exchanged
        owner = first.setdefault(id(tensor), name)
        if owner != name:
            ties.setdefault(owner, []).append(name)
    specs = []
    for name in first.values():
        tensor = state[name]
        parameter = parameters.get(name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        kind: Kind = "parameter" if parameter is not None else "statistic"
        if not tensor.dtype.is_floating_point:
            kind = "counter"
        placement = "frozen" if parameter is not None and not parameter.requires_grad else "shared"
        for pattern, value in placements:
            if fnmatchcase(name, pattern):
                placement = value
        group = "all"
        for pattern, value in groups:
            if fnmatchcase(name, pattern):
                group = value
        specs.append(
            TensorSpec(
                name, tuple(tensor.shape), dtype, kind, group, cast(Placement, placement),
                tuple(ties.get(name, ())),
            )
        )  # fmt: skip
    return Manifest(tuple(specs))


def weighted_mean(stack: Tensor, weights: Tensor) -> Tensor:
    """(n, elements), (n,) float64 summing to one -> (elements,) float64, added in row order."""
    out = torch.zeros(stack.shape[1], dtype=torch.float64)
    for row, weight in zip(stack, weights.tolist(), strict=True):
        out.add_(row, alpha=weight)
    return out
