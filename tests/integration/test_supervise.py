"""The supervisor without Ray: whoever is killed, nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestrator.compute.config import Level
from orchestrator.compute.supervise import end_session, session_members

ROOT = Path(__file__).parents[2]

# A caller that starts the program below and prints its process id.
CALLER = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]], start_new_session=True
)
print(child.pid, flush=True)
child.wait()
"""

# Starts a child, and another in a session of its own, says so, and waits.
PROGRAM = r"""
import os, signal, sys
from orchestrator.compute.supervise import Jail, supervise
from orchestrator.compute.config import Level

def body(level):
    for _ in range(2):
        if os.fork() == 0:
            os.setsid()
            os.write(1, f"up {level}\n".encode())  # at once: two of them write here
            signal.pause()
    signal.pause()

supervise(Jail(levels=(Level(sys.argv[2]),), loopback=False), int(sys.argv[1]), body)
"""


CASES = [
    (level, victim)
    for level in Level
    for victim in ("caller", "supervisor", "child")
    # Without a process-id namespace only the caller can clean up: test_end_session.
    if victim != "supervisor" or level is Level.NAMESPACES
]


@pytest.mark.parametrize(("level", "victim"), CASES)
def test_nothing_outlives_a_kill_9(level: Level, victim: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CALLER, PROGRAM, level.value],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        start_new_session=True,
    ) as caller:
        try:
            assert caller.stdout
            supervisor = int(caller.stdout.readline())
            ups = [caller.stdout.readline() for _ in range(2)]
            assert ups == [f"up {level}\n".encode()] * 2
            root = psutil.Process(supervisor)
            below = root.children(recursive=True)
            assert len(below) == (4 if level is Level.NAMESPACES else 3)
            target = {"caller": caller.pid, "supervisor": supervisor, "child": below[0].pid}
            os.kill(target[victim], signal.SIGKILL)
            _, alive = psutil.wait_procs([root, *below], timeout=20)
            assert [p for p in alive if p.is_running() and p.status() != "zombie"] == []
        finally:
            caller.kill()


def test_the_supervisor_ends_as_its_body_did() -> None:
    program = (
        "import os, sys\n"
        "from orchestrator.compute.supervise import Jail, supervise\n"
        "from orchestrator.compute.config import Level\n"
        "def body(level):\n"
        "    {}\n"
        "supervise(Jail(levels=tuple(Level)), os.getppid(), body)\n"
    )
    for statement, status in {
        "return 7": 7,
        "os.kill(os.getpid(), 15)": -15,
        "os.abort()": -6,
        "raise ValueError('x')": 70,
    }.items():
        code = program.format(statement)
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        assert done.returncode == status, done.stderr.decode()


def test_a_folder_that_cant_be_hidden_is_an_error_and_not_a_lower_level(tmp_path: Path) -> None:
    program = (
        "import os, sys\n"
        "from orchestrator.compute.supervise import Jail, supervise\n"
        "from orchestrator.compute.config import Level\n"
        "jail = Jail(levels=tuple(Level), hidden=(sys.argv[1],))\n"
        "supervise(jail, os.getppid(), lambda level: 0)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "nothing")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 1
    assert b"cannot hide" in done.stderr


def test_end_session_kills_what_a_killed_supervisor_left() -> None:
    program = "import os, signal; os.fork(); print('up', flush=True); signal.pause()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True
    ) as leader:
        assert leader.stdout
        for _ in range(2):
            leader.stdout.readline()
        leader.kill()
        leader.wait()
        assert len(session_members(leader.pid)) == 1
        assert end_session(leader.pid) == []
        assert session_members(leader.pid) == []
