"""Processes that we start: their output, their end, and that none outlives us."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.child import Child, end_at_once, marked, runs, wait_gone
from protos.errors import ComputeFailed

SLEEP = "import time\ntime.sleep(60)"
WITH_CHILD = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", {SLEEP!r}])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    started = []

    def begin(script: str, **more: object) -> Child:
        command = [sys.executable, "-S", "-c", textwrap.dedent(script)]
        child = Child("it", command, tmp_path / "log" / "it.log", **more)  # type: ignore[arg-type]
        started.append(child)
        return child

    yield begin
    for child in started:
        child.kill()


def test_first_line_and_log(start: Callable[..., Child]) -> None:
    child = start("print('one'); print('two')\nimport sys; print('three', file=sys.stderr)")
    assert child.first_line(10) == "one"
    assert child.join(10) == 0
    child._reader.join(10)
    assert set(child.log.read_text().split()) == {"one", "two", "three"}


def test_an_end_without_a_word_is_told_with_the_log(start: Callable[..., Child]) -> None:
    child = start("import sys; sys.exit('something broke')")
    with pytest.raises(ComputeFailed, match=r"it ended with exit code 1\nsomething broke"):
        child.first_line(10)


def test_silence_is_told_too(start: Callable[..., Child]) -> None:
    with pytest.raises(ComputeFailed, match=r"said nothing for 0\.1 s"):
        start(SLEEP).first_line(0.1)


def test_its_end_is_reported(start: Callable[..., Child]) -> None:
    ended = threading.Event()
    child = start(SLEEP, on_exit=lambda child: ended.set())
    child.terminate()
    assert ended.wait(10)
    assert child.described() == "it ended with signal SIGTERM"
    assert child.exit_code == -signal.SIGTERM


def test_kill_takes_the_descendants_along(start: Callable[..., Child]) -> None:
    child = start(WITH_CHILD)
    grandchild = psutil.Process(int(child.first_line(10)))
    child.kill()
    assert wait_gone([grandchild], 10) == []
    assert not child.alive


def test_who_is_marked_is_found(start: Callable[..., Child]) -> None:
    child = start(WITH_CHILD, environment={**os.environ, "FARFLUNG_TEST_MARK": str(os.getpid())})
    child.first_line(10)
    found = marked("FARFLUNG_TEST_MARK", str(os.getpid()))
    assert len(found) == 2
    end_at_once(found)
    assert not any(runs(process) for process in found)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_does_not_outlive_its_starter(tmp_path: Path, how: signal.Signals) -> None:
    script = f"""
    import sys, time
    from pathlib import Path
    from orchestrator.child import Child
    child = Child("it", [sys.executable, "-S", "-c", {SLEEP!r}], Path({str(tmp_path / "l")!r}))
    print(child.pid, flush=True)
    time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        child = psutil.Process(int(starter.stdout.readline()))
        starter.send_signal(how)
        assert wait_gone([child], 10) == []
