"""The isolated process: closes itself off, runs one function, writes one JSON object.

Started by ``sandbox.run_isolated``; the arguments are on standard input, the outcome goes to
what was standard output. The function's own prints go to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from orchestrator.compute.config import Level, Limits
from orchestrator.compute.functions import run_function
from orchestrator.compute.supervise import Jail, supervise

_RESERVE = 64 * 2**20  # what is left to report a MemoryError with
_OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")


def main() -> None:
    """Entry point of ``python -m orchestrator.compute.sandbox_child ORDER``."""
    order: dict[str, Any] = json.loads(sys.argv[1])
    cell = order["cell"]
    jail = Jail(
        levels=tuple(Level(level) for level in cell["levels"]),
        hidden=tuple(cell["hidden"]),
        loopback=False,
    )

    def body(level: Level) -> int:
        out = os.dup(1)
        os.dup2(2, 1)
        readable = [path for path in jail.hidden if level is Level.NONE and _readable(path)]
        if readable and not cell["reachable_keys"]:
            answer = _not_isolated(readable[0])
        else:
            answer = _run(order["spec"], Limits(**order["limits"]))
        with os.fdopen(out, "wb") as stream:
            stream.write(json.dumps(answer).encode())
        return 0

    supervise(jail, order["parent"], body)


def _readable(folder: str) -> bool:
    with contextlib.suppress(OSError):
        return any(Path(folder).iterdir())
    return False


def _not_isolated(folder: str) -> dict[str, Any]:
    return {
        "outcome": "not_isolated",
        "message": f"was not run: this host grants no namespaces, so it could read {folder}; "
        "allow user namespaces, or set `plugins_may_reach_keys = true` under [ray]",
        "where": folder,
    }


def _run(spec: str, limits: Limits) -> dict[str, Any]:
    # RLIMIT_DATA counts private writable memory; RLIMIT_AS would also count mapped models.
    bound = limits.memory_bytes
    text = sys.stdin.buffer.read().decode()
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound + _RESERVE))
    answer = run_function(spec, text, limits.threads)
    resource.setrlimit(resource.RLIMIT_DATA, (bound + _RESERVE, bound + _RESERVE))
    outcome: dict[str, Any] = json.loads(answer)
    if outcome.pop("ok"):
        return {"outcome": "ok", **outcome}
    cause, message = outcome["error"], outcome["message"]
    if cause in _OUT_OF_MEMORY or "can't allocate memory" in message:
        return {
            "outcome": "out_of_memory",
            "message": f"needed more than its {bound / 2**20:.0f} MiB of memory",
            "where": outcome["where"],
            "memory_bytes": bound,
        }
    text = f"raised {cause}: {message} ({outcome['where']})"
    return {"outcome": "raised", **outcome, "message": text}


if __name__ == "__main__":
    main()
