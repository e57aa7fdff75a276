"""Waiting for a file that another process makes."""

from __future__ import annotations

import time
from pathlib import Path


def wait_for(path: Path, seconds: float) -> None:
    """Wait until a file is there; a `TimeoutError` names it."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} was not made within {seconds} s")
        time.sleep(0.02)
