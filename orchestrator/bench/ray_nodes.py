"""A Ray cluster of several nodes on this machine, for measurements and tests; gone at the end.

Its nodes listen on this host's own addresses while it is there, and take nobody without its token.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.child import end_at_once
from orchestrator.compute.listeners import host_addresses
from orchestrator.port import free_port
from protos.errors import ComputeFailed

OBJECT_STORE_BYTES = 80 << 20
STARTED = "Ray runtime started"


@dataclass(frozen=True)
class RayNodes:
    """A running cluster.

    Attributes:
        address: HOST:PORT of its head.
        token_file: Its token.
        networks: Those of this host's addresses, one each.
        heads: Process of each node, under which all of the node's are.
    """

    address: str
    token_file: str
    networks: tuple[str, ...]
    heads: tuple[psutil.Process, ...]

    def process_ids(self) -> list[int]:
        """All processes of the cluster."""
        return [p.pid for head in self.heads for p in _tree(head)]


@contextmanager
def ray_nodes(count: int) -> Iterator[RayNodes]:
    """Start so many nodes with one CPU each, and end them.

    Raises:
        ComputeFailed: A node did not start; with what it said.
    """
    addresses = host_addresses()
    with tempfile.TemporaryDirectory(prefix="ff-", dir="/tmp") as folder:
        token = Path(folder, "token")
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        address = f"{addresses[0]}:{free_port()}"
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join(str(Path(p).absolute()) for p in sys.path if p),
            "HOME": folder,
        }
        with ExitStack() as stack:
            started = [
                stack.enter_context(_node(number, address, folder, environment))
                for number in range(count)
            ]
            yield RayNodes(
                address,
                str(token),
                tuple(f"{a}/{a.max_prefixlen}" for a in addresses),
                tuple(started),
            )


@contextmanager
def _node(
    number: int, address: str, folder: str, environment: dict[str, str]
) -> Iterator[psutil.Process]:
    host, _, port = address.rpartition(":")
    where = ["--head", f"--node-ip-address={host}", f"--port={port}", f"--temp-dir={folder}/ray"]
    where.append("--include-dashboard=false")
    if number:
        where = [f"--address={address}"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *where),
            *("--num-cpus=1", f"--object-store-memory={OBJECT_STORE_BYTES}"),
            "--disable-usage-stats",
            *("--min-worker-port=0", "--max-worker-port=0"),  # any, and not one of some fixed ones
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
    )
    assert process.stdout  # noqa: S101 - for the type checker
    own, output = psutil.Process(process.pid), process.stdout
    said = []
    try:
        for line in output:
            said.append(line)
            if STARTED in line:
                break
        else:
            raise ComputeFailed(f"Ray's node {number} did not start:\n{''.join(said)[-2000:]}")
        yield own
    finally:
        end_at_once(_tree(own))
        process.wait()
        output.close()


def _tree(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
