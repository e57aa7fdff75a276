"""A zygote (``zygote``), and the isolated process that it forks.

That closes itself off, runs one function and writes one JSON object: the arguments are on standard
input, the outcome goes to what was standard output, the function's own prints to standard error.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.compute.config import Level, Limits
from orchestrator.compute.functions import import_modules, run_function
from orchestrator.compute.supervise import Jail, supervise
from orchestrator.compute.zygote import MESSAGE_BYTES

IDLE_S = 120.0
"""Between rounds that take longer than this a start does not matter, and its memory would."""
_RESERVE = 64 * 2**20  # what is left to report a MemoryError with
_OUT_OF_MEMORY = ("MemoryError", "OutOfMemoryError")


def main() -> NoReturn:
    """Entry point of ``python -m orchestrator.compute.sandbox_child MODULE…``.

    Its standard input is the link to its caller: orders come, process ids and return codes go.
    """
    link = socket.socket(fileno=os.dup(0))
    with contextlib.suppress(Exception):  # the sandbox imports it again, and says what is wrong
        import_modules(tuple(sys.argv[1:]))
    gc.freeze()  # or a collection in a sandbox would write to every object's page
    own, last = os.getpid(), 0
    while select.select([link], [], [], IDLE_S)[0]:
        if last:  # only now, lest its number became another's while the caller still used it
            os.waitpid(last, 0)
        data, fds, _, _ = socket.recv_fds(link, MESSAGE_BYTES, 3)
        if not data:
            break
        last = os.fork()
        if last == 0:
            os.setsid()
            for number, fd in enumerate(fds):
                os.dup2(fd, number)
            os.closerange(3, max(*fds, link.fileno()) + 1)
            _carry_out(json.loads(data), own)
        for fd in fds:
            os.close(fd)
        if not _see_through(link, last):
            break
    os._exit(0)


def _see_through(link: socket.socket, pid: int) -> bool:
    """Tells the caller of a sandbox and of its end; whether the caller is there still."""
    ended = os.pidfd_open(pid)
    try:
        link.send(str(pid).encode())
        if ended not in select.select([link.fileno(), ended], [], [])[0]:
            return False  # while one runs the caller says nothing: it has gone
        found = os.waitid(os.P_PIDFD, ended, os.WEXITED | os.WNOWAIT)
        assert found is not None  # noqa: S101 - only WNOHANG gives None
        code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        link.send(str(code).encode())
    except OSError:
        return False
    finally:
        os.close(ended)
    return True


def _carry_out(order: Mapping[str, Any], parent: int) -> NoReturn:
    """Runs a function, closed off, and ends; with its zygote at the latest."""
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

    supervise(jail, parent, body)


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
