"""Gateways without their processes: the port, and what they ask of the daemon."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from orchestrator.config import DaemonConfig, parse_daemon
from orchestrator.gateway.gateway_service import GatewayService
from orchestrator.gateway.supervisor import reserve
from orchestrator.gateway.upstream import Upstream
from orchestrator.ledger import Acceptance, ContributionRow, PlanRow
from orchestrator.operator_socket import GATEWAY, OperatorSocket
from orchestrator.site_server import ServerKeys
from protos.contribution import Header
from protos.errors import ConfigInvalid, ContributionRefused, NotFound, Unavailable
from protos.v1 import gateway_pb2_grpc

WAIT_S = 20.0
ROW = ContributionRow(
    digest="d" * 64, plan_id="r/1/1/train", run="r", round=1, attempt=1, kind="train", site="north",
    work_digest="w" * 64, header=b"{}", signature=b"\0\1", fingerprint="f", index="i" * 64,
    manifest="m" * 64, nbytes=2**40, norm=None, received=1.5,
)  # fmt: skip

# -- the port -------------------------------------------------------------------------------------


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.gateway.supervisor.FORMER_S", 0.0)


def shared_server(port: int) -> grpc.Server:
    from concurrent.futures import ThreadPoolExecutor

    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 1)])
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server


def test_a_port_that_is_held_is_there_for_several_and_gets_no_connection() -> None:
    with reserve("127.0.0.1:0") as held:
        place = held.getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(place)
        servers = [shared_server(place[1]) for _ in range(2)]
        for _ in range(8):
            socket.create_connection(place).close()
        for server in servers:
            server.stop(0).wait()


@pytest.mark.usefixtures("_at_once")
@pytest.mark.parametrize("reuse", [0, 1])
def test_a_port_that_somebody_has_is_not_shared_with_him(reuse: int) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, reuse)
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(Unavailable, match=r"gateways\.bind: 127\.0\.0\.1:\d+ can't be bound"):
            reserve(f"127.0.0.1:{other.getsockname()[1]}")


def test_the_gateways_of_a_daemon_that_was_killed_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        bind = f"127.0.0.1:{other.getsockname()[1]}"
        monkeypatch.setattr("orchestrator.gateway.supervisor.time.sleep", lambda _: other.close())
        reserve(bind).close()


@pytest.mark.usefixtures("_at_once")
def test_an_address_of_another_machine_is_said() -> None:
    with pytest.raises(Unavailable, match=r"gateways\.bind"):
        reserve("192.0.2.1:8472")


def test_the_configuration() -> None:
    assert DaemonConfig().gateways_bind == "127.0.0.1:8472"
    config = parse_daemon('[listen]\nbind = "[::]:8470"\n[gateways]\nprocesses = 2')
    assert config.gateways_bind == "[::]:8472"
    given = parse_daemon('[gateways]\nbind = "0.0.0.0:9000"')
    assert (given.gateways_bind, given.gateways.processes) == ("0.0.0.0:9000", 0)
    for text, key in (
        ("processes = -1", "processes"),
        ('bind = "here"', "bind"),
        ('address = "train.example.org"', "address"),
    ):
        with pytest.raises(ConfigInvalid) as caught:
            parse_daemon(f"[gateways]\n{text}")
        assert caught.value.facts["key"] == f"gateways.{key}"


# -- what is asked --------------------------------------------------------------------------------


class Desk:
    """The daemon's recorder, ledger and compute, as far as gateways ask them."""

    def __init__(self) -> None:
        self.rows: list[ContributionRow] = []
        self.refused: list[tuple[str, ...]] = []
        self.bytes: list[tuple[str, int, int]] = []
        self.troubles: list[tuple[str, str]] = []
        self.begun, self.may_go_on, self.done = (threading.Event() for _ in range(3))
        self.may_go_on.set()

    def accept(self, row: ContributionRow) -> Acceptance:
        self.begun.set()
        assert self.may_go_on.wait(WAIT_S)
        self.rows.append(row)
        self.done.set()
        return Acceptance("counted", "r/1/2/train", "", again=True)

    def refuse(self, *what: str) -> None:
        self.refused.append(what)

    def moved(self, site: str, received: int = 0, sent: int = 0) -> None:
        self.bytes.append((site, received, sent))

    def troubled(self, site: str, text: str) -> None:
        self.troubles.append((site, text))

    def plan(self, plan_id: str, site: str) -> PlanRow | None:
        if site != "north":
            return None
        return PlanRow("r", 1, 1, "train", site, b"", "w" * 64)

    def check(self, row: PlanRow, header: Header, file: Path, payload: Path) -> Any:
        if payload.name == "bad":
            raise ContributionRefused("site north: its blocks can't be decoded", site="north")
        return (None, "w") if payload.name == "nan" else (2.5, "")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    (tmp_path / "run").mkdir(mode=0o700)
    desk = Desk()
    service: Any = GatewayService(
        parse_daemon('[store]\nurl = "s3://models/one"'), "f-test", "127.0.0.1:8472",
        ServerKeys(b"key", b"certificate", b"authority"), desk, desk, desk.check,  # type: ignore[arg-type]
    )  # fmt: skip
    with OperatorSocket(tmp_path, GATEWAY) as where:
        server = where.serve(
            lambda server: gateway_pb2_grpc.add_GatewayServicer_to_server(service, server)
        )
        assert where.path.stat().st_mode & 0o777 == 0o600
        yield desk
        server.stop(0).wait()


@pytest.fixture
def upstream(desk: Desk, tmp_path: Path) -> Iterator[Upstream]:
    upstream = Upstream(tmp_path)
    yield upstream
    upstream.close()


@pytest.mark.usefixtures("desk")
def test_a_gateway_is_told_what_to_serve_with(upstream: Upstream) -> None:
    opened = upstream.open()
    config = DaemonConfig.model_validate_json(opened.config)
    assert (config.store.url, opened.federation) == ("s3://models/one", "f-test")
    assert (opened.bind, opened.key, opened.authority) == ("127.0.0.1:8472", b"key", b"authority")


@pytest.mark.parametrize("norm", [None, 0.0, 3.5])
def test_a_contribution_comes_as_it_is(desk: Desk, upstream: Upstream, norm: float | None) -> None:
    from dataclasses import replace

    row = replace(ROW, norm=norm)
    assert upstream.accept(row) == Acceptance("counted", "r/1/2/train", "", again=True)
    assert desk.rows == [row]


def test_bytes_are_told_in_batches_and_before_the_contribution_counts(
    desk: Desk, upstream: Upstream
) -> None:
    desk.may_go_on.clear()
    for _ in range(100):
        upstream.moved("north", sent=10)
        upstream.moved("south", received=1)
    thread = threading.Thread(target=lambda: upstream.accept(ROW))
    thread.start()
    assert desk.begun.wait(WAIT_S)
    told = {site: (r, s) for site, r, s in desk.bytes}
    assert told == {"north": (0, 1000), "south": (100, 0)}
    desk.may_go_on.set()
    thread.join()


def test_a_gateway_that_dies_while_it_waits_loses_nothing(desk: Desk, tmp_path: Path) -> None:
    """Whoever counts tells the round: there is no message that could get lost in between."""
    desk.may_go_on.clear()
    upstream = Upstream(tmp_path)
    heard: list[Exception] = []

    def accept() -> None:
        try:
            upstream.accept(ROW)
        except Unavailable as error:
            heard.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    assert desk.begun.wait(WAIT_S)
    upstream.close()
    thread.join()
    assert len(heard) == 1
    desk.may_go_on.set()
    assert desk.done.wait(WAIT_S)
    assert desk.rows == [ROW]


def test_errors_come_as_they_are(desk: Desk, upstream: Upstream, tmp_path: Path) -> None:
    header = tmp_path / "head.header"
    header.write_bytes(b"{}")
    row = desk.plan("r/1/1/train", "north")
    assert row is not None
    with pytest.raises(Exception, match="header"):
        upstream.check_blocks(row, None, header, tmp_path / "good")  # type: ignore[arg-type]
    stranger = PlanRow("r", 1, 1, "train", "west", b"", "")
    with pytest.raises(NotFound, match="site west: no plan"):
        upstream.check_blocks(stranger, None, header, tmp_path / "good")  # type: ignore[arg-type]
    upstream.refuse("r/1/1/train", "north", "ContributionRefused", "why")
    assert desk.refused == [("r/1/1/train", "north", "ContributionRefused", "why")]
    upstream.troubled("north", "the disk is full")
    assert desk.troubles == [("north", "the disk is full")]


def test_a_daemon_that_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    upstream = Upstream(tmp_path)
    upstream.moved("north", sent=1)
    with pytest.raises(Unavailable):
        upstream.accept(ROW)
    upstream.close()
