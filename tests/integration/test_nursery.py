"""Trainers that are forked from one process: they speak, end and are ended as others are."""

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.bench.nursery import Nursery
from site_agent import pipe

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    yield nursery
    nursery.close()


def trainer(nursery: Nursery, folder: Path, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*nursery.command, "--site", "north", "--device", "cpu", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
    )


def started(process: subprocess.Popen[bytes]) -> pipe.Started:
    assert process.stdout is not None
    event = pipe.read_event(process.stdout.readline())
    assert isinstance(event, pipe.Started)
    return event


def test_they_are_processes_of_their_own_and_end_when_told(
    nursery: Nursery, tmp_path: Path
) -> None:
    two = [trainer(nursery, tmp_path) for _ in range(2)]
    for process in two:
        assert "torch" in started(process).packages
    forked = psutil.Process(nursery.pid).children()
    assert len(forked) == 2
    assert {child.cwd() for child in forked} == {str(tmp_path)}
    for process in two:
        process.communicate(pipe.Quit().encode(), timeout=30)
        assert process.returncode == 0
    psutil.wait_procs(forked, 30)
    assert psutil.Process(nursery.pid).children() == []


def test_a_failure_is_its_exit_code(nursery: Nursery, tmp_path: Path) -> None:
    process = trainer(nursery, tmp_path, "--precision", "unheard-of")
    process.communicate(timeout=30)
    assert process.returncode == 2  # argparse's


def test_a_link_that_kills_it_leaves_nothing(nursery: Nursery, tmp_path: Path) -> None:
    process = trainer(nursery, tmp_path)
    started(process)
    forked = psutil.Process(nursery.pid).children()
    process.kill()
    process.communicate()
    gone, alive = psutil.wait_procs(forked, 30)
    assert (len(gone), alive) == (1, [])


def test_one_that_is_killed_looks_killed(nursery: Nursery, tmp_path: Path) -> None:
    process = trainer(nursery, tmp_path)
    started(process)
    (forked,) = psutil.Process(nursery.pid).children()
    forked.kill()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
