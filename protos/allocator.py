"""glibc's allocator, told to keep what threads allocate in few places.

By default every thread may get an arena of its own, eight for each core, and keeps there what it
once used. With threads for every transfer and messages of 1 MiB a daemon of 130 MB grew to 900 MB,
most of it free: measured with four sites and a model of 400 MB (docs/evidence.md).
"""

from __future__ import annotations

import ctypes

_M_ARENA_MAX = -8  # malloc.h
ARENAS = 2


def use_few_arenas() -> None:
    """Bound the arenas of this process; to be called before it starts threads.

    Does nothing where the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, ARENAS)
