"""What went wrong in a job, in words that the link can weigh against the site's policy."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from protos.errors import ERRORS, FarflungError, TaskFailed
from site_agent.pipe import Failed

OURS = {Path(__file__).parents[2] / name for name in ("site_agent", "strategies", "protos")}
"""Folders whose code writes messages of tensors, keys and versions only."""

_TOO_BIG = ("can't allocate memory", "out of memory", "cannot allocate memory", "bad_alloc")


def describe(job: int, error: BaseException) -> Failed:
    """The line for an exception."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = isinstance(error, FarflungError) and bool(frames) and _is_ours(frames[-1].filename)
    kind = type(error) if type(error) in ERRORS else TaskFailed
    return Failed(
        job=job,
        error=kind.__name__,
        cause=type(error).__name__,
        where=_place(frames),
        message=str(error)[:4000],
        ours=ours,
        out_of_memory=is_out_of_memory(error),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or the device was not enough."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(t in text for t in _TOO_BIG)


def _place(frames: traceback.StackSummary) -> str:
    """file.py:line of the innermost frame that is neither ours nor a library's."""
    own = [f for f in frames if not _is_ours(f.filename) and "site-packages" not in f.filename]
    own = [f for f in own if not f.filename.startswith("<")] or list(frames)
    if not own:
        return ""
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def _is_ours(filename: str) -> bool:
    return any(folder in Path(filename).parents for folder in OURS)
