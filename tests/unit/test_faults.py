"""Fault points: which there are, that they do nothing by themselves, and what a test can make them do."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from protos import faults
from protos.faults import POINTS, Fault

ROOT = Path(__file__).resolve().parents[2]
BOTH_ENDS = ("orchestrator/", "site_agent/")


def in_the_code() -> list[tuple[str, str]]:
    """Every call of `reach`: the point and its module."""
    found = []
    for top in ("protos", "strategies", "orchestrator", "site_agent"):
        for file in sorted((ROOT / top).rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            if "reach(" not in text:
                continue
            for node in ast.walk(ast.parse(text)):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Name)
                    and node.func.id == "reach"
                ):
                    (point,) = node.args
                    assert isinstance(point, ast.Constant), f"{file}:{node.lineno}"
                    found.append((point.value, str(file.relative_to(ROOT))))
    return found


def test_every_point_of_the_list_is_in_the_code_once_and_there_is_no_other() -> None:
    found = in_the_code()
    assert [point for point, n in Counter(p for p, _ in found).items() if n > 1] == []
    assert dict(found) == POINTS
    assert all(point.count(".") >= 1 and point == point.lower() for point in POINTS)


def test_there_are_enough_of_them_at_both_ends() -> None:
    ends = Counter(end for module in POINTS.values() for end in BOTH_ENDS if module.startswith(end))
    assert sum(ends.values()) >= 120
    assert all(ends[end] >= 50 for end in BOTH_ENDS)


def run(code: str, folder: Path | None) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != faults.FOLDER}
    if folder is not None:
        env[faults.FOLDER] = str(folder)
    words = [sys.executable, "-c", f"from protos.faults import *\n{code}"]
    return subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True)


TWO = "enter('link')\nfor _ in range(2): reach('outbox.synced'); reach('outbox.renamed')\nprint('alive')"


def test_without_the_variable_nothing_happens(tmp_path: Path) -> None:
    Fault("outbox.synced").put(tmp_path)
    assert run(TWO, None).stdout == "alive\n"
    assert [file.name for file in tmp_path.iterdir()] == [faults.PLAN]


def test_a_process_is_killed_where_and_when_it_was_said(tmp_path: Path) -> None:
    Fault("outbox.synced", hit=2, process="link").put(tmp_path)
    began = time.monotonic()
    done = run(TWO, tmp_path)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")
    lines = [line.split(" ") for line in (tmp_path / faults.TRACE).read_text().splitlines()]
    assert [words[:2] for words in lines] == [
        ["link", "outbox.synced"], ["link", "outbox.renamed"], ["link", "outbox.synced"],
    ]  # fmt: skip
    times = [float(when) for _, _, when in lines]
    assert began <= times[0] <= times[1] <= times[2] <= time.monotonic()
    assert not (tmp_path / faults.PLAN).exists()
    assert (tmp_path / faults.DONE).exists()
    assert run(TWO, tmp_path).stdout == "alive\n"  # once


def test_a_plan_for_another_process_is_left_to_it(tmp_path: Path) -> None:
    Fault("outbox.synced", process="trainer").put(tmp_path)
    assert run(TWO, tmp_path).stdout == "alive\n"
    assert (tmp_path / faults.PLAN).exists()


@pytest.fixture
def following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(faults.FOLDER, str(tmp_path))
    monkeypatch.setattr(faults, "_following", [])
    faults.enter("daemon")
    return tmp_path


def test_it_may_fail_or_wait_instead(following: Path) -> None:
    Fault("ledger.written", do="raise", error="EIO").put(following)
    with pytest.raises(OSError, match="Input/output"):
        faults.reach("ledger.written")
    faults.reach("ledger.written")
    Fault("ledger.written", do="delay", seconds=0.05).put(following)
    began = time.monotonic()
    faults.reach("ledger.written")
    assert time.monotonic() - began >= 0.05


def test_a_name_that_is_none_is_noticed(following: Path) -> None:
    with pytest.raises(ValueError, match=r"outbox\.sinked"):
        Fault("outbox.sinked").put(following)
    with pytest.raises(ValueError, match=r"outbox\.sinked"):
        faults.reach("outbox.sinked")
