"""`farflung demo`: its table, and that nothing of it stays behind, however it ends."""

import json
import os
import secrets
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.child import end_at_once, marked, program, wait_gone
from tests.support.files import wait_for

MARK = "FARFLUNG_TEST_DEMO"

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]


class Demo:
    """A demo that runs."""

    def __init__(self, root: Path, *words: str) -> None:
        self.root = root
        self.mark = secrets.token_hex(8)
        self.process = subprocess.Popen(
            [*program("farflung", "orchestrator.cli"), "demo", "--home", str(root), *words],
            env={**os.environ, MARK: self.mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.family: list[psutil.Process] = []

    def until(self, words: str) -> None:
        """Wait for words in its output."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if words in line:
                return
        raise AssertionError(f"the demo ended without {words!r}")

    def end(self, how: signal.Signals) -> int:
        """Send a signal to the demo alone, and wait for its end."""
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(how)
        self.process.communicate(timeout=60)
        return self.process.returncode

    def left(self) -> list[psutil.Process]:
        """Whoever still runs."""
        return wait_gone([*self.family, *marked(MARK, self.mark)], 20.0)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        end_at_once([*self.family, *marked(MARK, self.mark)])


@pytest.fixture
def demos(tmp_path: Path) -> Iterator[list[Demo]]:
    started: list[Demo] = []
    yield started
    for demo in started:
        demo.close()


def test_the_closing_table(demos: list[Demo], tmp_path: Path) -> None:
    demo = Demo(tmp_path / "d", "--rounds", "1", "--json")
    demos.append(demo)
    told, _ = demo.process.communicate(timeout=380)
    assert demo.process.returncode == 0, told
    found = json.loads(told)
    titles = [row["title"] for row in found["results"]]
    assert len(titles) == 4
    assert all(
        word in " ".join(titles) for word in ("co-learning", "FedAvg", "isolated", "central")
    )
    for row in found["results"]:
        assert 0.2 < row["accuracy"] <= 1
        assert row["nll"] > 0
        assert 0 <= row["ece_after"] <= 1
    learned, averaged = found["results"][:2]
    model = Path(found["model"]) / "model.safetensors"
    # Both start from the same first model, which the sites may still have from the run before.
    assert 0 <= learned["wire_bytes"] - averaged["wire_bytes"] <= 3 * model.stat().st_size
    assert Path(found["ledger"]).is_file()
    assert found["dashboard"].startswith("http://127.0.0.1:")
    assert demo.left() == []


@pytest.mark.parametrize(
    ("how", "code"),
    [
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_interrupted_in_a_round(
    demos: list[Demo], tmp_path: Path, how: signal.Signals, code: int
) -> None:
    demo = Demo(tmp_path / "d")
    demos.append(demo)
    demo.until("Round 1 of")
    assert demo.end(how) == code
    assert demo.left() == []


@pytest.mark.parametrize(
    "seen", ["log/daemon.log", pytest.param("log/east.log", marks=pytest.mark.slow)]
)
def test_interrupted_while_it_starts(demos: list[Demo], tmp_path: Path, seen: str) -> None:
    demo = Demo(tmp_path / "d")
    demos.append(demo)
    wait_for(tmp_path / "d" / seen, 60)
    assert demo.end(signal.SIGINT) == 130
    assert demo.left() == []


def test_a_second_demo_does_not_touch_the_first(tmp_path: Path) -> None:
    (tmp_path / "orchestrator").mkdir()
    done = subprocess.run(
        [*program("farflung", "orchestrator.cli"), "demo", "--home", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 75
    assert "holds a federation already" in done.stderr
