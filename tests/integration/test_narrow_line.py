"""A line that a model and a contribution fill for minutes: control is heard, and nobody looks dead."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.narrow import INSIDE, possible

pytestmark = pytest.mark.skipif(bool(possible()), reason=f"no narrow line: {possible()}")


def saturate(folder: Path, *words: str) -> dict[str, Any]:
    """What tests/support/saturated.py saw, in namespaces of its own."""
    command = [*INSIDE, sys.executable, "-m", "tests.support.saturated", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_full_line_is_noticed_and_left_room_on(tmp_path: Path) -> None:
    found = saturate(tmp_path, "--mbit", "4", "--model-mb", "4")
    assert found["came"]
    assert found["attached"] == 1
    assert found["narrow"] == ["down", "up"]
    assert found["fetches"] == found["uploads"] == 2  # the first went on through the valve


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("ends", [["--daemon", "--model-mb", "15"], ["--model-mb", "25"]])
def test_control_is_heard_within_a_second_for_minutes(tmp_path: Path, ends: list[str]) -> None:
    found = saturate(tmp_path, "--mbit", "2", "--queue-s", "0.4", *ends)
    least_s = found["model_bytes"] * 8 / 2e6
    assert found["seconds"] > 2 * least_s > 100  # full all the time
    assert found.get("state", "finished") == "finished"
    assert found["attached"] == 1
    assert not found.get("silent")
    assert len(found["round_trips"]) > 100
    seconds = sorted(seconds for _, seconds in found["round_trips"])
    assert seconds[len(seconds) * 99 // 100] < 1.0  # the rest is for a machine that does other work
