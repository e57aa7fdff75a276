"""Parts that a method adds to a task's model, in the place of one of its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from torch import Tensor, nn

from protos.errors import ConfigInvalid
from strategies.context import Step
from strategies.stack import Stack


class Tap:
    """What a module found in the forward pass of a step, for the objective that follows it.

    ``batch`` opens it, the next forward pass fills and closes it, ``objective`` takes what is in
    it. So further passes of the same step (of another strategy) leave it alone, no graph outlives
    its step, and a copy of the model starts with a closed one.

    Attributes:
        open: Whether the next pass is the one to keep.
    """

    def __init__(self) -> None:
        self.open = False
        self._found: Any = None

    def put(self, found: Any) -> None:
        """Keep it, and close."""
        self._found, self.open = found, False

    def take(self) -> Any:
        """Give it, and forget it.

        Raises:
            LookupError: No pass filled it since it was last opened.
        """
        if self._found is None:
            raise LookupError("the grafted module was not asked in this step")
        found, self._found = self._found, None
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Tap:
        return Tap()


def graft(model: nn.Module, path: str, make: Callable[[nn.Module], nn.Module], owner: str) -> None:
    """Put ``make(module)`` in the place of the module at ``path``.

    Args:
        model: Changed in place.
        path: Dotted name of the module.
        make: Gets the module that was there.
        owner: Name of the strategy, for the error.

    Raises:
        ConfigInvalid: The model has no such module; names those that it has.
    """
    parent, key = _place(model, path, owner)
    parent.add_module(key, make(parent.get_submodule(key)))


def join_tail(model: nn.Module, path: str, owner: str) -> None:
    """Make one module of the one at ``path`` and all that follow it in the same `nn.Sequential`.

    In any other parent, the module is left as it is.

    Raises:
        ConfigInvalid: See `graft`.
    """
    parent, key = _place(model, path, owner)
    if not isinstance(parent, nn.Sequential):
        return
    names = [name for name, _ in parent.named_children()]
    following = names[names.index(key) :]
    if len(following) == 1:
        return
    tail = nn.Sequential(*(parent.get_submodule(name) for name in following))
    for name in following:
        parent.add_module(name, None)
        del parent._modules[name]
    parent.add_module(key, tail)


def _place(model: nn.Module, path: str, owner: str) -> tuple[nn.Module, str]:
    known = dict(model.named_modules())
    if not path or path not in known:
        names = ", ".join(name for name in known if name)
        raise ConfigInvalid(
            f'strategy {owner}: the model has no module "{path}"; it has {names}',
            key=f"strategy.{owner}",
        )
    parent, _, key = path.rpartition(".")
    return known[parent], key


def last_layer(model: nn.Module) -> str:
    """Dotted name of the last module that has parameters of its own."""
    names: list[str] = [
        name
        for name, m in model.named_modules()
        if name and next(m.parameters(recurse=False), None) is not None
    ]
    if not names:
        raise ConfigInvalid("the model has no module with parameters", key="strategy")
    return names[-1]


def width_in(module: nn.Module, owner: str) -> int:
    """Features that a module takes: of the first of its layers that says so.

    Raises:
        ConfigInvalid: None does.
    """
    return _width(module.modules(), ("in_features", "in_channels", "num_features"), owner)


def width_out(model: nn.Module, owner: str, path: str = "") -> int:
    """Features that the module at ``path`` gives (the whole model for "").

    Of the last layer that says so in it or before it, in the order in which the model names them:
    a pooling layer gives as many as it gets. (So what is grafted names what it adds first, and what
    was there last.)

    Raises:
        ConfigInvalid: None does, or the model has no such module.
    """
    if path:
        _place(model, path, owner)
    start = f"{path}." if path else ""
    named = list(model.named_modules())
    end = max(k for k, (name, _) in enumerate(named) if f"{name}.".startswith(start))
    layers = [module for _, module in named[: end + 1]]
    return _width(reversed(layers), ("out_features", "out_channels", "num_features"), owner)


def _width(layers: Iterable[nn.Module], names: tuple[str, ...], owner: str) -> int:
    for layer in layers:
        for name in names:
            if isinstance(width := getattr(layer, name, None), int):
                return width
    raise ConfigInvalid(
        f"strategy {owner}: no layer says how wide it is ({', '.join(names)})",
        key=f"strategy.{owner}",
    )


def loss_of(outputs: Tensor, step: Step) -> Tensor:
    """The loss of further outputs for the step's batch: of the strategy that owns it, or the task's."""
    if "graft.stack" not in step.scratch:
        step.scratch["graft.stack"] = Stack(step.plan.stack)
    return cast(Stack, step.scratch["graft.stack"]).loss(replace(step, outputs=outputs))


def pooled(features: Tensor) -> Tensor:
    """Features (n, channels, …) as (n, channels): the mean over positions."""
    return features if features.dim() == 2 else features.flatten(2).mean(dim=2)
