"""The floor of an exchange: the same bytes over gRPC with mutual TLS, and nothing else.

One process at the orchestrator's end and one for each site. The sender sends one buffer again and
again, the receiver throws it away: no files, no digests, no signatures, no arithmetic, no protocol
buffers. No system on this stack can be cheaper on this machine.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import grpc

from orchestrator.bench.sampler import Group, Sampler
from orchestrator.child import Child
from protos.identity import Identity, certificate_pem, issue, key_pem, new_authority, new_key

CHUNKS = (1 << 20, 4 << 20)
"""Sizes of a message that are tried; the cheaper one is the floor."""

SERVICE = "farflung.bench.Floor"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
]
START_S = 60.0


class Floor(NamedTuple):
    """What one round costs at least.

    Attributes:
        chunk_bytes: Size of a message at which processor time was least.
        wall_s: Median over the rounds but the first.
        cpu_s: The same, over all processes.
    """

    chunk_bytes: int
    wall_s: float
    cpu_s: float


def measure_floor(sites: int, model_bytes: int, rounds: int) -> Floor:
    """The floor of an exchange of a model with all sites at once, down and up.

    Args:
        sites: Processes beside the server.
        model_bytes: Bytes to each site, and again from it.
        rounds: At least 2; the first is left out.
    """
    with tempfile.TemporaryDirectory(prefix="farflung-floor-") as folder:
        _write_identities(Path(folder))
        found = [_measure(Path(folder), sites, model_bytes, rounds, chunk) for chunk in CHUNKS]
    return min(found, key=lambda floor: floor.cpu_s)


def _measure(folder: Path, sites: int, model_bytes: int, rounds: int, chunk: int) -> Floor:
    log = folder / "floor.log"
    module = [sys.executable, "-m", "orchestrator.bench.floor"]
    started: list[Child] = []
    try:
        server = Child(
            "floor server", [*module, "server", str(folder), str(chunk), str(sites)], log
        )
        started.append(server)
        address = server.first_line(START_S)
        for site in range(sites):
            words = [str(folder), str(chunk), address, str(model_bytes), str(rounds)]
            started.append(Child(f"floor site {site}", [*module, "site", *words], log))
        groups = {child.name: Group([child.pid]) for child in started}
        with Sampler(groups) as sampler:
            marks = [json.loads(child.first_line(START_S * rounds)) for child in started[1:]]
            for child in started[1:]:
                child.join(START_S)
    finally:
        for child in started:
            child.kill()
    walls, cpus = [], []
    for round in range(1, rounds):
        start = min(mark[round][0] for mark in marks)
        end = max(mark[round][1] for mark in marks)
        walls.append(end - start)
        cpus.append(sampler.cpu_s(start, end))
    return Floor(chunk, median(walls), median(cpus))


def _write_identities(folder: Path) -> None:
    authority = new_authority("floor")
    (folder / "ca.pem").write_bytes(certificate_pem(authority[1]))
    for role, hosts in (("orchestrator", ("127.0.0.1",)), ("site", ())):
        key = new_key()
        identity = Identity("floor", role, role)  # type: ignore[arg-type]
        certificate = issue(authority, key.public_key(), identity, timedelta(days=1), hosts)
        (folder / f"{role}.key").write_bytes(key_pem(key))
        (folder / f"{role}.pem").write_bytes(certificate_pem(certificate))


# -- the two kinds of processes ----------------------------------------------------------------------


def _pieces(total: int, chunk: int) -> Iterator[bytes]:
    buffer = bytes(chunk)
    whole, rest = divmod(total, chunk)
    for _ in range(whole):
        yield buffer
    if rest:
        yield buffer[:rest]


def _serve(folder: Path, chunk: int, sites: int) -> None:
    """The server: sends and discards; a barrier lets all sites begin a round together."""
    barrier = threading.Barrier(sites)

    def begin(request: bytes, context: Any) -> bytes:
        barrier.wait()
        return b""

    def down(request: bytes, context: Any) -> Iterator[bytes]:
        return _pieces(int(request), chunk)

    def up(requests: Iterator[bytes], context: Any) -> bytes:
        for _ in requests:
            pass
        return b""

    server = grpc.server(ThreadPoolExecutor(2 * sites + 2), options=OPTIONS)
    handlers: dict[str, Any] = {
        "Begin": grpc.unary_unary_rpc_method_handler(begin),
        "Down": grpc.unary_stream_rpc_method_handler(down),
        "Up": grpc.stream_unary_rpc_method_handler(up),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    credentials = grpc.ssl_server_credentials(
        [((folder / "orchestrator.key").read_bytes(), (folder / "orchestrator.pem").read_bytes())],
        root_certificates=(folder / "ca.pem").read_bytes(),
        require_client_auth=True,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    sys.stdout.write(f"127.0.0.1:{port}\n")
    sys.stdout.flush()
    server.wait_for_termination()


def _visit(folder: Path, chunk: int, address: str, model_bytes: int, rounds: int) -> None:
    """A site: fetches and sends, round after round; says when each began and ended."""
    credentials = grpc.ssl_channel_credentials(
        (folder / "ca.pem").read_bytes(),
        (folder / "site.key").read_bytes(),
        (folder / "site.pem").read_bytes(),
    )
    marks = []
    with grpc.secure_channel(address, credentials, options=OPTIONS) as channel:
        begin: Any = channel.unary_unary(f"/{SERVICE}/Begin")
        down: Any = channel.unary_stream(f"/{SERVICE}/Down")
        up: Any = channel.stream_unary(f"/{SERVICE}/Up")
        for _ in range(rounds):
            begin(b"")
            start = time.time()
            for _ in down(str(model_bytes).encode()):
                pass
            up(_pieces(model_bytes, chunk))
            marks.append((start, time.time()))
        begin(b"")
    sys.stdout.write(json.dumps(marks) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    if sys.argv[1] == "server":
        _serve(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        _visit(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
