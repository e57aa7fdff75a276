"""What went wrong in a job, in words that the link can weigh against the site's policy."""

from __future__ import annotations

import errno
import os
import sysconfig
import traceback
from pathlib import Path

import torch

from protos.errors import ERRORS, FarflungError, TaskFailed
from site_agent.pipe import Failed

OURS = {Path(__file__).parents[2] / name for name in ("site_agent", "strategies", "protos")}
"""Folders whose code writes messages of tensors, keys and versions only."""

STANDARD = Path(sysconfig.get_path("stdlib"))

_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
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
        system=what_the_system_said(error),
        out_of_memory=is_out_of_memory(error),
        shared_memory=is_out_of_shared_memory(error),
        device_lost=is_device_lost(error),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of the host or the device was not enough."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(t in text for t in _TOO_BIG)


def what_the_system_said(error: BaseException) -> str:
    """Of an error of the operating system its text without names; libraries hide that of a disk."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    said = str(error)
    return next((text for text in map(os.strerror, _OF_DISKS) if text in said), "")


def is_out_of_shared_memory(error: BaseException) -> bool:
    """Whether a loader's process could not hand a batch on: torch and the kernel say it in these ways."""
    text = str(error).lower()
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError | OSError) and (
        "shared memory" in text
        # A lock between processes lies in /dev/shm too.
        or ("no space left" in text and any("multiprocessing" in f.filename for f in frames))
        or ("torch_" in text and "no space left" in text)
        or ("dataloader worker" in text and "bus error" in text)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether the device failed: after that nothing on it works any more in this process."""
    kind = getattr(torch, "AcceleratorError", None)  # since 2.8; before it, a RuntimeError like any
    if kind is not None and isinstance(error, kind):
        return not is_out_of_memory(error)
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error")


def _place(frames: traceback.StackSummary) -> str:
    """file.py:line of the innermost frame that is neither ours nor a library's."""
    own = [f for f in frames if not _is_ours(f.filename) and not _is_library(f.filename)]
    own = [f for f in own if not f.filename.startswith("<")] or list(frames)
    if not own:
        return ""
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}"


def _is_library(filename: str) -> bool:
    return "site-packages" in filename or STANDARD in Path(filename).parents


def _is_ours(filename: str) -> bool:
    return any(folder in Path(filename).parents for folder in OURS)
