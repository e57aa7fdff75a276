"""Runs a function of the table: JSON text in, JSON text out, errors as data.

The same code runs in Ray's workers, in the isolated child and in the in-process twin.
"""

from __future__ import annotations

import importlib
import json
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "platlib", "purelib"))


def resolve(spec: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The function of "module:function"."""
    module, _, name = spec.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{spec} is not a function")
    return function  # type: ignore[no-any-return]


def run_function(spec: str, text: str, threads: int = 1) -> str:
    """Runs "module:function" on the arguments in ``text``.

    Args:
        spec: From the table of functions, never from a request.
        text: The arguments, a JSON object.
        threads: Threads of torch, if the function uses it. One in reducers: ``norm``, ``dot``
            and ``mean(0)`` give other bits with another number of threads.

    Returns:
        ``{"ok": true, "value": …}`` or ``{"ok": false, "error": …, "message": …, "where": …}``.
        Floats survive exactly, NaN and infinities included: both ends are Python's ``json``.
    """
    before = _threads()
    try:
        function = resolve(spec)
        _set_threads(threads)
        value = function(json.loads(text))
        return json.dumps({"ok": True, "value": value})
    except BaseException as error:  # noqa: BLE001 - SystemExit, too, must not end a worker
        return json.dumps({"ok": False, **describe(error)})
    finally:
        if before:
            _set_threads(before)


def describe(error: BaseException) -> dict[str, str]:
    """Class, message and place (file and line) of an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    # The line that its author wrote, not the one in the library that it called.
    last = next(reversed(own or frames), None)
    where = f"{Path(last.filename).name}:{last.lineno} in {last.name}" if last else ""
    return {"error": type(error).__name__, "message": str(error)[:4000], "where": where}


def import_modules(modules: tuple[str, ...]) -> None:
    """Imports modules ahead of the first task that needs them."""
    for module in modules:
        importlib.import_module(module)
    _set_threads(1)


def _threads() -> int:
    torch = sys.modules.get("torch")
    return int(torch.get_num_threads()) if torch else 0


def _set_threads(threads: int) -> None:
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
