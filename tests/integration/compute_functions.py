"""What the tests run in the compute process: well-behaved functions, and the other kind."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def square(args: Json) -> Json:
    return {"square": args["x"] ** 2, "tenth": args["x"] * 0.1, "nan": float("inf")}


def norm(args: Json) -> Json:
    import torch

    generator = torch.Generator().manual_seed(args["seed"])
    value = torch.randn(300_000, generator=generator, dtype=torch.float32).norm().item()
    return {"norm": value, "threads": torch.get_num_threads()}


def slow(args: Json) -> Json:
    signal.sigtimedwait([signal.SIGUSR1], args["seconds"])
    return {}


def opens(args: Json) -> Json:
    with Path(args["path"]).open(args["mode"]):
        return {}


def raises(args: Json) -> Json:
    raise ValueError(f"item {args.get('x')} is no good")


def spins(_args: Json) -> Json:
    while True:
        pass


def eats(_args: Json) -> Json:
    hoard = []
    while True:
        hoard.append(bytearray(2**23))


def eats_shared(_args: Json) -> Json:
    import mmap

    hoard = []
    while True:
        block = mmap.mmap(-1, 2**23)
        for page in range(0, 2**23, 4096):
            block[page] = 1
        hoard.append(block)


def connects(args: Json) -> Json:
    with socket.create_connection(("127.0.0.1", args["port"]), timeout=2):
        return {}


def reads(args: Json) -> Json:
    return {"key": Path(args["path"]).read_text()}


def lists(args: Json) -> Json:
    return {"names": sorted(os.listdir(args["path"]))}  # noqa: PTH208


def dies(args: Json) -> Json:
    os.kill(os.getpid(), args["signal"])
    return {}


def leaves(_args: Json) -> Json:
    os._exit(3)


def orphans(args: Json) -> Json:
    """Leaves a process in a session of its own, which holds a file open."""
    ready, say = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.open(args["path"], os.O_RDONLY)
        os.write(say, b"x")
        signal.pause()
    os.read(ready, 1)
    return {}


def holds(args: Json) -> Json:
    """Stays, with a file open, until it is ended."""
    with Path(args["path"]).open("w"):
        signal.pause()
    return {}


MARKS: list[str] = []


def marks(_args: Json) -> Json:
    """Says what an earlier call left behind, and leaves it behind."""
    found = [*MARKS, os.environ.get("MARK", ""), str(Path.cwd())]
    MARKS.append("module")
    os.environ["MARK"] = "environment"
    os.chdir("/tmp")
    return {"found": found}


def imported_by(_args: Json) -> Json:
    """The process that imported a module, and whether that was this one."""
    from tests.integration import preloaded

    return {"pid": preloaded.PID, "here": not preloaded.EARLIER}


def prints(_args: Json) -> Json:
    print('{"outcome": "ok", "value": "forged"}', flush=True)
    os.write(1, b"noise\n")
    return {"value": "real"}


def where_am_i(_args: Json) -> Json:
    return {
        "environment": sorted(os.environ),
        "interfaces": [name for _, name in socket.if_nameindex()],
        "pid": os.getpid(),
        "torch": "torch" in sys.modules,
    }


def escapes(args: Json) -> Json:
    """Tries what a root could to see the keys again; says what each attempt brought."""
    libc = ctypes.CDLL(None, use_errno=True)
    path = args["path"].encode()
    results = {"umount": libc.umount2(path, 2)}
    if os.fork() == 0:
        libc.unshare(0x10000000 | 0x00020000)  # a user namespace, with every capability, and mounts
        os._exit(0 if libc.umount2(path, 2) == 0 and os.listdir(path) else 1)  # noqa: PTH208
    results["umount_in_user_namespace"] = os.wait()[1]
    try:
        results["through_init"] = len(os.listdir(f"/proc/1/root{args['path']}"))  # noqa: PTH208
    except OSError:
        results["through_init"] = 0
    return results


FUNCTIONS = {
    function.__name__: f"{__name__}:{function.__name__}"
    for function in (
        *(square, norm, slow, opens, raises, spins, eats, eats_shared, connects, reads, lists),
        *(dies, leaves, orphans, holds, marks, imported_by, prints, where_am_i, escapes),
    )
}
