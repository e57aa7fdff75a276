"""Ports of this machine."""

from __future__ import annotations

from pathlib import Path
from random import SystemRandom
from socket import create_server

from protos.errors import ComputeFailed

TRIES = 100
LOWEST = 10_000
OUTGOING = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, now nor, most likely, later.

    It comes from below the range that outgoing connections take theirs from: a daemon that is
    started again must find its port free, since its sites know no other.

    Raises:
        ComputeFailed: None was found.
    """
    low = int(OUTGOING.read_text().split()[0]) if OUTGOING.exists() else 32768
    random = SystemRandom()
    for _ in range(TRIES):
        port = random.randrange(LOWEST, max(low, LOWEST + TRIES))
        try:
            create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise ComputeFailed(f"no free port on 127.0.0.1 in {TRIES} tries")
