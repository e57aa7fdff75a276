"""What can go wrong in the compute process, as classes whose facts are attributes.

    ComputeFailed                (protos.errors)
    ├── ComputeNotReady          Ray did not come up, or not in time
    │   └── ComputeExposed       Ray listens where others could reach it; nothing was served
    ├── ComputeDied              the process ended while a request was open
    ├── ComputeTimedOut          the request's own time was over; its tasks were cancelled
    ├── ComputeRefused           an unknown function, or a request beyond its bounds
    ├── FunctionFailed           a mapped function raised (``index``, ``error``, ``where``)
    └── PluginFailed             an isolated function did not return
        ├── PluginRaised         it raised (``error``, ``where``)
        ├── PluginKilled         it was killed by a signal, or left without a result
        ├── PluginOutOfMemory    it needed more than ``memory_bytes``
        ├── PluginTimedOut       it ran longer than ``seconds``
        └── PluginNotIsolated    this host cannot isolate it, so it was not run

They are all ``ComputeFailed`` to the outside, whose row in ``protos.errors.ERRORS`` they share.
"""

from __future__ import annotations

from typing import Any

from protos.errors import ComputeFailed, FarflungError

Fact = str | int | float | bool


class ComputeNotReady(ComputeFailed):
    """Ray did not come up, or not in time."""


class ComputeExposed(ComputeNotReady):
    """Ray listens on addresses that others could reach, so it was stopped."""


class ComputeDied(ComputeFailed):
    """The compute process ended while a request was open."""


class ComputeTimedOut(ComputeFailed):
    """A request was not done in its time; what it had started was cancelled."""


class ComputeRefused(ComputeFailed):
    """The function is not in the table, or the request breaks a bound."""


class FunctionFailed(ComputeFailed):
    """A mapped function raised; the facts name it, the item and the line."""


class PluginFailed(ComputeFailed):
    """An isolated function did not return a result."""


class PluginRaised(PluginFailed):
    """The isolated function raised."""


class PluginKilled(PluginFailed):
    """The isolated function's process was killed, or ended without a result."""


class PluginOutOfMemory(PluginFailed):
    """The isolated function needed more memory than it was given."""


class PluginTimedOut(PluginFailed):
    """The isolated function ran longer than it was given."""


class PluginNotIsolated(PluginFailed):
    """This host can't isolate a plug-in, so it was not run."""


_CLASSES: dict[str, type[FarflungError]] = {
    cls.__name__: cls
    for cls in (
        ComputeFailed,
        ComputeNotReady,
        ComputeExposed,
        ComputeDied,
        ComputeTimedOut,
        ComputeRefused,
        FunctionFailed,
        PluginFailed,
        PluginRaised,
        PluginKilled,
        PluginOutOfMemory,
        PluginTimedOut,
        PluginNotIsolated,
    )
}


def to_json(error: BaseException, where: str = "") -> dict[str, Any]:
    """An error as the protocol carries it; a class that is not ours becomes ``ComputeFailed``."""
    if isinstance(error, FarflungError) and type(error).__name__ in _CLASSES:
        place = str(error.facts.get("where", where))
        return {
            "class": type(error).__name__,
            "message": error.message,
            "where": place,
            "facts": error.facts,
        }
    name = type(error).__name__
    return {
        "class": "ComputeFailed",
        "message": f"{name} in the compute process: {error}",
        "where": where,
        "facts": {"error": name},
    }


def from_json(value: dict[str, Any]) -> FarflungError:
    """The typed error of :func:`to_json`'s value."""
    facts: dict[str, Fact] = dict(value.get("facts") or {})
    if value.get("where"):
        facts["where"] = str(value["where"])
    cls = _CLASSES.get(str(value.get("class")), ComputeFailed)
    return cls(str(value.get("message")), **facts)
