"""Closing a gRPC channel that may never close."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from protos.hang_up import hang_up
from tests.unit.fake_operator import fake_daemon

STUCK = """
import sys, threading
from pathlib import Path
import grpc
from orchestrator import client
from orchestrator.gateway.upstream import Upstream

opened = grpc.insecure_channel

class Stuck:
    def __init__(self, channel):
        self._channel = channel

    def __getattr__(self, name):
        return getattr(self._channel, name)

    def close(self):
        threading.Event().wait()

grpc.insecure_channel = lambda *args, **options: Stuck(opened(*args, **options))
if sys.argv[1] == "client":
    with client.OperatorClient(Path(sys.argv[2])) as daemon:
        print(daemon.status().running)
else:
    Upstream(Path(sys.argv[2])).close()
print("ended")
"""


class Slow:
    """A real channel that closes when it is released."""

    def __init__(self) -> None:
        self._channel = grpc.insecure_channel("localhost:1")
        self.closing, self.released, self.closed = (threading.Event() for _ in range(3))

    def close(self) -> None:
        self.closing.set()
        self.released.wait()
        self._channel.close()
        self.closed.set()


def test_a_channel_that_closes_in_time_is_closed() -> None:
    slow = Slow()
    with ThreadPoolExecutor(1) as pool:
        hanging_up = pool.submit(hang_up, slow, 60)
        assert slow.closing.wait(60)
        assert not hanging_up.done()
        slow.released.set()
        hanging_up.result(60)
    assert slow.closed.is_set()


def test_a_channel_that_does_not_is_left_behind() -> None:
    slow = Slow()
    hang_up(slow, 0.1)
    assert not slow.closed.is_set()
    slow.released.set()
    assert slow.closed.wait(60)


@pytest.mark.parametrize("what", ["client", "upstream"])
def test_a_process_ends_whose_channel_never_closes(what: str, tmp_path: Path) -> None:
    with fake_daemon(tmp_path / "home"):
        done = subprocess.run(
            [sys.executable, "-c", STUCK, what, str(tmp_path / "home")],
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "ended"), done.stderr
