"""The parts of compute that need no process: addresses, lines, errors, configuration."""

from __future__ import annotations

import io
import ipaddress

import pytest

from orchestrator.compute import (
    ComputeConfig,
    InProcessCompute,
    Level,
    Limits,
    driver,
    errors,
)
from orchestrator.compute.listeners import Listener, parse, require_private
from orchestrator.compute.protocol import MAX_LINE_BYTES, Lines, LineTooLong

# As the kernel prints them: 127.0.0.1:8080 and 0.0.0.0:22 listen, the third is a connection.
TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4712 1
   2: 0100007F:1F90 0100007F:A000 01 00000000:00000000 00:00000000 00000000     0        0 4713 1
"""
# [::ffff:127.0.0.1]:443, [::]:80 and [fd00::2]:81.
TCP6 = """  sl  local_address  remote_address  st tx_queue rx_queue tr tm->when retrnsmt uid timeout inode
   0: 0000000000000000FFFF00000100007F:01BB 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 1 1
   1: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 2 1
   2: 000000FD000000000000000002000000:0051 00000000000000000000000000000000:0000 0A 0:0 0:0 0 0 0 3 1
"""
HOSTS = [ipaddress.ip_address("10.1.2.3"), ipaddress.ip_address("fd00::2")]


def test_listening_sockets_are_read_from_the_kernels_tables() -> None:
    found = [(str(x.address), x.port, x.inode) for x in parse(TCP)]
    assert found == [("127.0.0.1", 8080, 4711), ("0.0.0.0", 22, 4712)]
    found = [(str(x.address), x.port, x.inode) for x in parse(TCP6)]
    assert found == [("127.0.0.1", 443, 1), ("::", 80, 2), ("fd00::2", 81, 3)]


def listener(address: str) -> Listener:
    return Listener(ipaddress.ip_address(address), 6379, 1)


def test_loopback_is_private() -> None:
    require_private([listener("127.0.0.1"), listener("::1")], HOSTS, [])


@pytest.mark.parametrize(
    ("address", "networks", "exposed"),
    [
        ("10.1.2.3", [], True),
        ("10.1.2.3", ["10.0.0.0/8"], False),
        ("10.1.2.3", ["192.168.0.0/16"], True),
        # On all addresses: each address of the host has to be private.
        ("0.0.0.0", ["10.0.0.0/8"], True),
        ("0.0.0.0", ["10.0.0.0/8", "fd00::/8"], False),
        ("::", ["0.0.0.0/0", "::/0"], False),
    ],
)
def test_who_may_be_reached(address: str, networks: list[str], exposed: bool) -> None:
    if not exposed:
        require_private([listener(address)], HOSTS, networks)
        return
    with pytest.raises(errors.ComputeExposed, match="private_networks") as caught:
        require_private([listener(address)], HOSTS, networks)
    assert ":6379" in str(caught.value.facts["where"])


def test_errors_keep_class_facts_and_place() -> None:
    error = errors.PluginKilled("killed", signal="SIGSEGV", where="x.py:3")
    copy = errors.from_json(errors.to_json(error))
    assert (type(copy), copy.message, copy.facts) == (errors.PluginKilled, "killed", error.facts)
    foreign = errors.from_json(errors.to_json(KeyError("x"), where="map"))
    assert type(foreign).__name__ == "ComputeFailed"
    assert foreign.facts["where"] == "map"


def test_lines_are_bounded_and_a_cut_line_is_the_end() -> None:
    out = io.BytesIO()
    lines = Lines(io.BytesIO(b'{"id": 1}\n{"id": 2'), out)
    assert lines.receive() == {"id": 1}
    assert lines.receive() is None
    with pytest.raises(LineTooLong):
        lines.send({"x": "y" * MAX_LINE_BYTES})
    assert out.getvalue() == b""


def test_the_configuration_survives_the_command_line() -> None:
    config = ComputeConfig(
        num_cpus=3,
        hidden=("/home/keys",),
        private_networks=("10.0.0.0/8",),
        levels=(Level.NETWORK, Level.NONE),
        preload=("torch",),
    )
    assert ComputeConfig.from_json(config.to_json()) == config
    with pytest.raises(ValueError, match="absolute"):
        ComputeConfig(hidden=("keys",))
    with pytest.raises(ValueError, match="positive"):
        Limits(seconds=0, memory_bytes=1)


def test_requests_have_bounds() -> None:
    twin = InProcessCompute(ComputeConfig(functions={"f": "json:loads"}))
    with pytest.raises(errors.ComputeRefused, match="the limit is 100000"):
        twin.map("f", [{}] * 100_001, 1.0)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The current node timed out during startup. The GCS has become overloaded.", []),
        ("no space for its sockets", ["Ray did not start: no space for its sockets"]),
    ],
)
def test_a_ray_that_was_only_slow_is_started_again(
    said: str, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*_: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(driver, "RayEngine", start)
    written = io.BytesIO()
    config = ComputeConfig(functions={}, temp_dir="/nowhere")
    assert driver.serve(config, Level.NONE, io.BytesIO(), written) == 1
    lines = Lines(io.BytesIO(written.getvalue()), io.BytesIO())
    messages = list(iter(lines.receive, None))
    assert [m["error"]["message"] for m in messages if m["event"] == "failed"] == told
    assert len(messages) == len(told), "an end without a word: the daemon starts it again"
