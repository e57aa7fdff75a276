"""All strategies by name: our own, and third parties' through the entry point ``farflung.strategies``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

import strategies
from protos.errors import ConfigInvalid, NotFound
from protos.plan import first_problem
from strategies.protocol import Strategy


@cache
def catalogue() -> Mapping[str, type[Strategy]]:
    """Every strategy that can be named in a run file, sorted by name.

    Raises:
        ConfigInvalid: Two strategies have one name.
    """
    found: dict[str, type[Strategy]] = {}
    for folder in pkgutil.iter_modules(strategies.__path__, "strategies."):
        if not folder.ispkg:
            continue
        package = importlib.import_module(folder.name)
        for module in pkgutil.iter_modules(package.__path__, f"{folder.name}."):
            _collect(importlib.import_module(module.name), found)
    for point in entry_points(group="farflung.strategies"):
        _add(point.load(), found)
    return dict(sorted(found.items()))


def _collect(module: Any, found: dict[str, type[Strategy]]) -> None:
    for value in vars(module).values():
        if (
            isinstance(value, type)
            and issubclass(value, Strategy)
            and value is not Strategy
            and value.__module__ == module.__name__
            and hasattr(value, "name")
        ):
            _add(value, found)


def _add(cls: type[Strategy], found: dict[str, type[Strategy]]) -> None:
    other = found.setdefault(cls.name, cls)
    if other is not cls:
        raise ConfigInvalid(
            f"two strategies are called {cls.name}: {other.__module__} and {cls.__module__}",
            key="strategy",
        )


def make(name: str, params: Mapping[str, Any]) -> Strategy:
    """A strategy from a run file's entry.

    Raises:
        NotFound: No strategy has that name; says which come close.
        ConfigInvalid: A hyperparameter is unknown or out of range; says which.
    """
    cls = catalogue().get(name)
    if cls is None:
        from difflib import get_close_matches

        near = get_close_matches(name, catalogue(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise NotFound(
            f"strategy: there is no {name}{hint} `farflung strategies` lists them", name=name
        )
    try:
        return cls.model_validate(dict(params))
    except ValidationError as error:
        raise ConfigInvalid(
            f"strategy {name}: {first_problem(error)}", key=f"strategy.{name}"
        ) from None
