"""Scenarios are slow tests, but for a few of one file: which, follows from the variable SEED."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

SAMPLE = 2


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all of them but the sample, which shares the one federation of its file."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        if item.path.parent == Path(__file__).parent:
            files.setdefault(item.path, []).append(item)
    drawn: set[pytest.Item] = set()
    if files:
        draw = random.Random(int(os.environ.get("SEED") or 0))
        chosen = files[draw.choice(sorted(files))]
        drawn = set(draw.sample(chosen, min(SAMPLE, len(chosen))))
    for item in (item for found in files.values() for item in found):
        if item not in drawn:
            item.add_marker(pytest.mark.slow)
