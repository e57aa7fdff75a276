"""The floor of an exchange: the same bytes over gRPC with mutual TLS, and nothing else.

One process at the orchestrator's end and one for each site. The sender sends one buffer again and
again, the receiver throws it away: no files, no digests, no signatures, no arithmetic, no protocol
buffers. No system on this stack can be cheaper on this machine.

The floor of a round (``durable``) also has what its guarantees can't do without, and once each: a
site's contribution is a synced file in a synced folder before it is sent, and again at the
orchestrator before it is answered; plan, model and commit are one synced write each. The next round
begins when the last site has its answer.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import grpc

from orchestrator.bench.sampler import Group, Sampler
from orchestrator.child import Child
from protos.chunks import sync_folder
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


def measure_floor(sites: int, model_bytes: int, rounds: int, durable: bool = False) -> Floor:
    """The floor of an exchange of a model with all sites at once, down and up.

    Args:
        sites: Processes beside the server.
        model_bytes: Bytes to each site, and again from it.
        rounds: At least 2; the first is left out.
        durable: With the synced writes of a round.
    """
    sizes = CHUNKS[:1] if model_bytes <= CHUNKS[0] else CHUNKS
    with tempfile.TemporaryDirectory(prefix="farflung-floor-") as folder:
        _write_identities(Path(folder))
        found = [
            _measure(Path(folder), sites, model_bytes, rounds, size, durable) for size in sizes
        ]
    return min(found, key=lambda floor: floor.cpu_s)


def _measure(
    folder: Path, sites: int, model_bytes: int, rounds: int, chunk: int, durable: bool
) -> Floor:
    log = folder / "floor.log"
    how = "durable" if durable else "fleeting"
    module = [sys.executable, "-m", "orchestrator.bench.floor", how]
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
        with Sampler(groups, 0.05 if sites < 16 else 0.5) as sampler:
            marks = [json.loads(child.first_line(START_S * rounds)) for child in started[1:]]
            for child in started[1:]:
                child.join(START_S)
    finally:
        for child in started:
            child.kill()
    starts = [min(mark[round][0] for mark in marks) for round in range(1, rounds)]
    ends = [max(mark[round][1] for mark in marks) for round in range(1, rounds)]
    walls = [end - start for start, end in zip(starts, ends, strict=True)]
    cpus = [sampler.cpu_s(start, end) for start, end in zip(starts, ends, strict=True)]
    if durable:  # a round is shorter than the time between two samples
        walls = [b - a for a, b in pairwise([*starts, ends[-1]])]
        cpus = [sampler.cpu_s(starts[0], ends[-1]) / len(starts)]
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


def _write(path: Path, parts: Iterable[bytes]) -> None:
    """A file that survives a power cut."""
    with path.open("wb", buffering=0) as file:
        for part in parts:
            file.write(part)
        os.fsync(file.fileno())
    sync_folder(path.parent)


def _serve(folder: Path, chunk: int, sites: int, durable: bool) -> None:
    """The server: sends and discards; a barrier lets all sites begin a round together."""
    journal = (folder / f"journal-{os.getpid()}").open("wb", buffering=0)
    spool = folder / f"server-{os.getpid()}"
    spool.mkdir()
    numbers = count()

    def between_rounds() -> None:
        if durable:
            for _ in ("commit", "plan"):
                journal.write(bytes(4096))
                os.fdatasync(journal.fileno())
            _write(spool / "model", [bytes(4096)])

    barrier = threading.Barrier(sites, between_rounds)

    def begin(request: bytes, context: Any) -> bytes:
        barrier.wait()
        return b""

    def down(request: bytes, context: Any) -> Iterator[bytes]:
        return _pieces(int(request), chunk)

    def up(requests: Iterator[bytes], context: Any) -> bytes:
        if durable:
            path = spool / f"{next(numbers)}"
            _write(path, requests)
            path.unlink()
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


def _visit(
    folder: Path, chunk: int, address: str, model_bytes: int, rounds: int, durable: bool
) -> None:
    """A site: fetches and sends, round after round; says when each began and ended."""
    outbox = folder / f"site-{os.getpid()}"
    outbox.mkdir()
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
        for round in range(rounds):
            begin(b"")
            start = time.time()
            for _ in down(str(model_bytes).encode()):
                pass
            if durable:
                _write(outbox / f"{round}", _pieces(model_bytes, chunk))
            up(_pieces(model_bytes, chunk))
            marks.append((start, time.time()))
        begin(b"")
    sys.stdout.write(json.dumps(marks) + "\n")
    sys.stdout.flush()


def _main(how: str, role: str, folder: str, chunk: str, *words: str) -> None:
    durable = how == "durable"
    if role == "server":
        _serve(Path(folder), int(chunk), int(words[0]), durable)
    else:
        _visit(Path(folder), int(chunk), words[0], int(words[1]), int(words[2]), durable)


if __name__ == "__main__":
    _main(*sys.argv[1:])
