"""Why no connection comes about, as a site says it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from protos.errors import NotEnrolled, Unavailable
from protos.identity import certificate_pem, key_pem
from site_agent.link.wire import probe
from tests.support.authority import Authority


@pytest.fixture(scope="module")
def ours() -> Authority:
    return Authority()


@pytest.fixture
def address(ours: Authority, request: pytest.FixtureRequest) -> Iterator[str]:
    """An orchestrator's server, as far as TLS goes; with a parameter, one of so many days from now."""
    now = datetime.now(UTC) + timedelta(days=getattr(request, "param", 0))
    hosts = ("127.0.0.1",)
    key, certificate = ours.leaf("orchestrator", "orchestrator", hosts=hosts, now=now)
    pair = (key_pem(key), certificate_pem(certificate))
    server = grpc.server(ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials([pair], ours.pem, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0).wait()


def keys(folder: Path, trusted: Authority, by: Authority) -> Path:
    """A site's keys: whom it trusts, and who issued its certificate."""
    key, certificate = by.pems("north")
    for name, data in (("key.pem", key), ("cert.pem", certificate), ("ca.pem", trusted.pem)):
        (folder / name).write_bytes(data)
    return folder


def test_a_site_that_is_welcome_has_no_problem(
    tmp_path: Path, ours: Authority, address: str
) -> None:
    assert probe(address, keys(tmp_path, ours, ours), "north") is None


def test_a_certificate_that_is_refused_is_named(
    tmp_path: Path, ours: Authority, address: str
) -> None:
    found = probe(address, keys(tmp_path, ours, Authority()), "north")
    assert type(found) is NotEnrolled
    assert "it refuses the certificate of site north" in found.message


def test_a_stranger_in_the_orchestrators_place_is_named(
    tmp_path: Path, ours: Authority, address: str
) -> None:
    found = probe(address, keys(tmp_path, Authority(), ours), "north")
    assert type(found) is NotEnrolled
    assert "from another authority" in found.message


@pytest.mark.parametrize("address", [-2, 2], indirect=True)
def test_clocks_that_do_not_agree_are_named(tmp_path: Path, ours: Authority, address: str) -> None:
    found = probe(address, keys(tmp_path, ours, ours), "north")
    assert type(found) is NotEnrolled
    assert "one of the two clocks is wrong" in found.message
    assert "another authority" not in found.message


def test_a_line_that_breaks_in_the_handshake_blames_no_certificate(
    tmp_path: Path, ours: Authority
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def hang_up() -> None:
            connection, _ = listening.accept()
            connection.recv(1)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        port = listening.getsockname()[1]
        found = probe(f"127.0.0.1:{port}", keys(tmp_path, ours, ours), "north")
        thread.join()
    assert type(found) is Unavailable
    assert "the connection is closed before it says anything" in found.message
