"""What tests do to lines, disks and clocks does what it says."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import disk
from tests.support.clock import Clock, clocks_possible
from tests.support.proxy import Proxy, Way

SOON_S = 0.05
"""What comes at all on loopback comes within this."""


@dataclass
class Ends:
    """A connection through a proxy."""

    line: Proxy
    server: socket.socket
    site: socket.socket
    daemon: socket.socket

    def dial(self) -> socket.socket:
        return _dial(self.line)


def _dial(line: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", line.port), timeout=10)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        with Proxy(f"127.0.0.1:{server.getsockname()[1]}") as line:
            site = _dial(line)
            daemon, _ = server.accept()
            daemon.settimeout(10)
            with site, daemon:
                yield Ends(line, server, site, daemon)


def received(end: socket.socket, count: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < count and (more := end.recv(count - len(data))):
        data += more
    return data


def silent(end: socket.socket) -> bool:
    """Whether neither bytes nor an end of the connection come."""
    end.settimeout(SOON_S)
    try:
        end.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        end.settimeout(10)
    return False


def test_a_frozen_line_passes_nothing_and_closes_nothing(ends: Ends) -> None:
    ends.line.freeze()
    ends.site.sendall(b"held")
    ends.site.close()
    assert silent(ends.daemon)
    with ends.dial() as other:
        other.sendall(b"too")
        assert silent(other)
    ends.line.mend()
    assert ends.daemon.recv(10) == b"held"
    assert ends.daemon.recv(10) == b""


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_line_may_freeze_one_way(ends: Ends, way: Way) -> None:
    frozen, other = (ends.daemon, ends.site) if way == "up" else (ends.site, ends.daemon)
    ends.line.freeze(way)
    ends.site.sendall(b"x")
    ends.daemon.sendall(b"x")
    assert other.recv(1) == b"x"
    assert silent(frozen)
    ends.line.mend()
    assert frozen.recv(1) == b"x"


def test_a_severed_line_refuses_and_is_mended_at_the_same_port(ends: Ends) -> None:
    ends.line.sever()
    for end in (ends.site, ends.daemon):
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with pytest.raises(ConnectionRefusedError):
        ends.dial()
    ends.line.mend()
    with ends.dial() as again:
        again.sendall(b"x")
        daemon, _ = ends.server.accept()
        with daemon:
            assert daemon.recv(1) == b"x"


def test_bytes_are_flipped_doubled_and_swapped_once(ends: Ends) -> None:
    for how, arrives in (
        ("corrupt", b"abcdegghij"),
        ("duplicate", b"abcdefghijabcdefghij"),
        ("reorder", b"fghijabcde"),
    ):
        done = ends.line.up.meddle(how, after=3)  # type: ignore[arg-type]
        ends.site.sendall(b"123")
        assert received(ends.daemon, 3) == b"123"
        assert not done.is_set()
        ends.site.sendall(b"abcdefghij")
        assert received(ends.daemon, len(arrives)) == arrives
        assert done.is_set()
        ends.site.sendall(b"again")
        assert received(ends.daemon, 5) == b"again"


def test_a_long_line_is_late_and_not_slow(ends: Ends) -> None:
    ends.line.up.delay_s = 0.1
    began = time.monotonic()
    for number in range(8):
        ends.site.sendall(bytes([number]))
        while ends.line.up.nbytes <= number:
            os.sched_yield()
    assert received(ends.daemon, 8) == bytes(range(8))
    assert 0.1 <= time.monotonic() - began < 8 * 0.1


def test_one_bit_of_a_file_flips_unnoticed(tmp_path: Path) -> None:
    file = tmp_path / "payload"
    file.write_bytes(b"abc")
    before = file.stat().st_mtime_ns
    assert disk.flip(file) == 1
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (b"acc", before)


@pytest.mark.skipif(bool(disk.small_disks_possible()), reason=disk.small_disks_possible())
def test_a_small_disk_is_full_and_then_not(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    disk.mount(folder, 1 << 20)
    try:
        disk.fill(folder, leave_bytes=64 << 10)
        (folder / "fits").write_bytes(bytes(32 << 10))
        disk.fill(folder)
        with pytest.raises(OSError) as caught:
            (folder / "more").write_bytes(bytes(8 << 10))
        assert caught.value.errno == errno.ENOSPC
        disk.empty(folder)
        (folder / "more").write_bytes(bytes(512 << 10))
    finally:
        disk.unmount(folder)


TELL = """
import json, sys, time
for line in sys.stdin:
    print(json.dumps([time.time(), time.monotonic()]), flush=True)
"""


@pytest.mark.skipif(bool(clocks_possible()), reason=clocks_possible())
def test_a_clock_is_turned_while_its_process_runs(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "clock")
    command = [sys.executable, "-I", "-S", "-c", TELL]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clock.variables, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask() -> tuple[float, float]:
            process.stdin.write("\n")
            process.stdin.flush()
            wall, monotonic = json.loads(process.stdout.readline())
            return wall - time.time(), monotonic - time.monotonic()

        assert ask() == pytest.approx((0, 0), abs=0.5)
        clock.turn(-3600)
        assert ask() == pytest.approx((-3600, 0), abs=0.5)
        clock.turn(90)
        assert ask() == pytest.approx((90, 0), abs=0.5)
        process.stdin.close()
