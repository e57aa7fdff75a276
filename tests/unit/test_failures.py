"""What a trainer says of an exception, and what of it may leave the site."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from site_agent.config import PolicySection
from site_agent.link.disclosure import Disclosure
from site_agent.trainer.failures import describe

LOST = getattr(torch, "AcceleratorError", RuntimeError)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/patient-4711"),
            "the task failed: FileNotFoundError: No such file or directory at ",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on"),
        (LOST("CUDA error: unspecified launch failure"), "the device failed ("),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "the task ran out of memory ("),
        (
            RuntimeError("DataLoader worker (pid 4711) is killed by signal: Bus error. "),
            "the task ran out of shared memory (",
        ),
        (ValueError("patient 4711 has no label"), "the task failed: ValueError at "),
    ],
)
def test_the_cause_is_named_and_no_data(tmp_path: Path, error: Exception, words: str) -> None:
    def task() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        task()
    failed = describe(1, raised.value)
    told = Disclosure("north", PolicySection(), tmp_path / "sent.log").failure(failed)
    assert told.startswith("site north: ")
    assert words in told
    assert "test_failures.py:" in told
    assert "4711" not in told


def test_the_place_is_the_tasks_and_not_the_librarys(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        (tmp_path / "patient-4711").read_bytes()
    assert describe(1, raised.value).where.startswith("test_failures.py:")
