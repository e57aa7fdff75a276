"""Checks a stack at launch, and runs the strategies' ``plan`` hooks before a round."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from torch import Tensor

from orchestrator.arithmetic.places import Reader, open_place
from protos.plan import OptimizerChoice, Schedule, StrategyChoice, Work
from protos.tensors import from_bytes
from strategies.needs import AT_THE_ORCHESTRATOR
from strategies.protocol import Draft, RoundSummary
from strategies.stack import Stack


def stack_of(choices: list[dict[str, Any]]) -> Stack:
    """The stack of some choices in JSON."""
    return Stack([StrategyChoice.model_validate(c) for c in choices])


def check_stack(args: dict[str, Any]) -> dict[str, Any]:
    """What a stack needs and which hooks it has; raises what is wrong with it.

    Args:
        args: ``stack``: the choices.
    """
    stack = stack_of(args["stack"])
    return {
        "needs": sorted(stack.needs),
        "asks_task": bool(stack.needs & AT_THE_ORCHESTRATOR.keys() or stack.having("build")),
        "warnings": {s.name: s.warning for s in stack.strategies if s.warning},
        "hooks": {s.name: list(s.hooks()) for s in stack.strategies},
        "fields": {s.name: s.model_dump(mode="json") for s in stack.strategies},
        "codec": stack.codec.name if stack.codec else "",
        "passing": [s.name for s in stack.strategies if not s.lasts],
    }


def plan_round(args: dict[str, Any]) -> dict[str, Any]:
    """The draft of a round after all ``plan`` hooks, the active stack, and the next memos.

    Args:
        args: ``stack``, ``memos``, ``draft`` (fields of `Draft`, ``last`` among them) and
            ``payloads`` (name to {path, offset, nbytes, dtype, shape}).
    """
    stack = stack_of(args["stack"])
    raw = args["draft"]
    last = raw["last"]
    change = last["relative_change"]
    with payload_loader() as load:
        pooled = {name: load(spec) for name, spec in args.get("payloads", {}).items()}
    summary = RoundSummary(
        round=last["round"],
        relative_change=math.nan if change is None else change,
        scores=last["scores"],
        payloads=pooled,
        sites=tuple(last["sites"]),
    )
    draft = Draft(
        round=raw["round"],
        rounds=raw["rounds"],
        last=summary,
        cohort=tuple(raw["cohort"]),
        work=Work.model_validate(raw["work"]),
        schedule=Schedule.model_validate(raw["schedule"]),
        optimizer=OptimizerChoice.model_validate(raw["optimizer"]),
        batch_size=raw["batch_size"],
        payload=dict(raw["payload"]),
    )
    active = Stack(stack.active(draft.round))
    memos = args["memos"]
    draft, changed = active.plan(draft, memos)
    return {
        "stack": [c.model_dump(mode="json") for c in active.choices],
        "cohort": list(draft.cohort),
        "work": draft.work.model_dump(mode="json"),
        "schedule": draft.schedule.model_dump(mode="json"),
        "optimizer": draft.optimizer.model_dump(mode="json"),
        "batch_size": draft.batch_size,
        "payload": dict(draft.payload),
        "memos": {**memos, **changed},
    }


@contextmanager
def payload_loader() -> Iterator[Callable[[Mapping[str, Any]], Tensor]]:
    """Loads side payloads, each from its ``path`` (a location); every place is opened once.

    In a bucket each opening is a connection and a request of its own.
    """
    readers: dict[str, Reader] = {}
    with ExitStack() as opened:

        def load(spec: Mapping[str, Any]) -> Tensor:
            place, start = spec["path"], spec["offset"]
            if place not in readers:
                readers[place] = opened.enter_context(closing(open_place(place)))
            data = bytearray(spec["nbytes"])
            readers[place].read_into(memoryview(data), start, start + len(data))
            return from_bytes(data, spec["dtype"], tuple(spec["shape"]))

        yield load
