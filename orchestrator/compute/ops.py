"""What the daemon can ask for: a small table, the same for Ray and for the in-process twin."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from orchestrator.compute import errors
from orchestrator.compute.config import Limits

MAX_ITEMS = 100_000

_PLUGIN_ERRORS: dict[str, type[errors.PluginFailed]] = {
    "raised": errors.PluginRaised,
    "killed": errors.PluginKilled,
    "out_of_memory": errors.PluginOutOfMemory,
    "timed_out": errors.PluginTimedOut,
    "not_isolated": errors.PluginNotIsolated,
}


class Engine(Protocol):
    """Where functions run: Ray's workers, or this process."""

    functions: Mapping[str, str]

    def facts(self) -> dict[str, Any]:
        """What is known about the engine."""
        ...

    def map(self, spec: str, texts: list[str], timeout_s: float) -> list[str]:
        """The answers of ``run_function`` to every text, in order."""
        ...

    def isolated(self, spec: str, text: str, limits: Limits, timeout_s: float) -> dict[str, Any]:
        """The outcome of ``sandbox.run_isolated``."""
        ...


def perform(engine: Engine, op: str, args: dict[str, Any], timeout_s: float) -> Any:
    """Does one request.

    Raises:
        ComputeFailed: One of its classes; ``ComputeRefused`` for what isn't in the table.
    """
    handler = OPS.get(op)
    if handler is None:
        raise errors.ComputeRefused(f"no operation {op!r}; there are {', '.join(OPS)}", op=op)
    return handler(engine, args, timeout_s)


def _ping(engine: Engine, _args: dict[str, Any], _timeout_s: float) -> dict[str, Any]:
    return engine.facts()


def _map(engine: Engine, args: dict[str, Any], timeout_s: float) -> list[Any]:
    name, items = str(args["function"]), args["items"]
    spec = _spec(engine, name)
    if len(items) > MAX_ITEMS:
        message = f"{len(items)} items for {name}; the limit is {MAX_ITEMS}"
        raise errors.ComputeRefused(message, function=name, items=len(items))
    values = []
    answers = engine.map(spec, [json.dumps(item) for item in items], timeout_s)
    for index, answer in enumerate(answers):
        outcome = json.loads(answer)
        if not outcome["ok"]:
            cause, where = outcome["error"], outcome["where"]
            raise errors.FunctionFailed(
                f"{name} raised {cause} at item {index} of {len(items)}: {outcome['message']} "
                f"({where})",
                function=name,
                index=index,
                error=cause,
                where=where,
            )
        values.append(outcome["value"])
    return values


def _isolated(engine: Engine, args: dict[str, Any], timeout_s: float) -> Any:
    name = str(args["function"])
    spec, limits = _spec(engine, name), Limits(**args["limits"])
    outcome = engine.isolated(spec, json.dumps(args["args"]), limits, timeout_s)
    kind, message = outcome.pop("outcome"), outcome.pop("message", "")
    if kind == "ok":
        return outcome["value"]
    raise _PLUGIN_ERRORS[kind](f"the plug-in {name} {message}", function=name, **outcome)


def _spec(engine: Engine, name: str) -> str:
    if name not in engine.functions:
        known = ", ".join(sorted(engine.functions))
        message = f"no function {name!r} in the compute process's table; there are {known}"
        raise errors.ComputeRefused(message, function=name)
    return engine.functions[name]


OPS: dict[str, Callable[[Engine, dict[str, Any], float], Any]] = {
    "ping": _ping,
    "map": _map,
    "isolated": _isolated,
}
