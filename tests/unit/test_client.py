"""The operator's client against a daemon that only answers."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import views
from orchestrator.client import OperatorClient
from orchestrator.operator_socket import LONGEST_PATH, OperatorSocket
from protos.errors import Conflict, InvalidInput, NotFound, Unavailable
from tests.unit.fake_operator import FakeOperator, fake_daemon


@pytest.fixture
def operator(tmp_path: Path) -> Iterator[FakeOperator]:
    with fake_daemon(tmp_path / "home") as running:
        yield running


@pytest.fixture
def client(tmp_path: Path, operator: FakeOperator) -> Iterator[OperatorClient]:
    with OperatorClient(tmp_path / "home") as made:
        yield made


def event(number: int) -> views.Event:
    return views.Event(number=number, time=float(number), kind="log", text=f"event {number}")


def test_views_come_back_as_views(client: OperatorClient, operator: FakeOperator) -> None:
    assert client.status().running == "fashion-1"
    assert [site.state for site in client.sites()] == ["attached", "gone"]
    assert client.runs() == operator.run_views
    assert client.run("digits").state == "finished"
    assert client.rounds("fashion") == operator.round_views
    assert client.extend("fashion", 4).rounds == 7
    assert client.collect(dry_run=True).dry_run
    assert client.revoke("north").state == "revoked"


def test_arguments_arrive(client: OperatorClient, operator: FakeOperator) -> None:
    client.invite("north", 60.0)
    client.launch("name = 'x'", start_from="a@3", start_file=b"\0\1")
    invite, launch = operator.asked
    assert (invite.site, invite.valid_s) == ("north", 60.0)
    assert (launch.config, launch.start_from, launch.start_file) == ("name = 'x'", "a@3", b"\0\1")


def test_errors_come_back_as_what_they_were(client: OperatorClient) -> None:
    with pytest.raises(NotFound, match="there is no nothing") as info:
        client.run("nothing")
    assert info.value.facts == {"run": "nothing"}
    with pytest.raises(Conflict, match="ended already"):
        client.stop("fashion", now=True)


def test_events_end_where_nobody_follows(client: OperatorClient, operator: FakeOperator) -> None:
    operator.events = [event(1), event(2), event(3)]
    assert [e.number for e in client.watch(after=1, follow=False)] == [2, 3]


def test_a_follower_is_ended_from_another_thread(
    client: OperatorClient, operator: FakeOperator
) -> None:
    operator.events = [event(1)]
    stream = client.watch()
    assert next(stream).number == 1
    threading.Thread(target=lambda: (operator.following.wait(10), stream.close())).start()
    assert list(stream) == []


def test_export_writes_whole_files(
    client: OperatorClient, operator: FakeOperator, tmp_path: Path
) -> None:
    operator.files = [("model.safetensors", b"ab"), ("model.safetensors", b"cd"), ("card.md", b"")]
    there = tmp_path / "a" / "b"
    assert client.export("fashion", "best", there) == [
        there / "model.safetensors",
        there / "card.md",
    ]
    assert (there / "model.safetensors").read_bytes() == b"abcd"
    assert sorted(p.name for p in there.iterdir()) == ["card.md", "model.safetensors"]
    assert operator.asked[-1].round == "best"


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\0b"])
def test_export_writes_nowhere_else(
    client: OperatorClient, operator: FakeOperator, tmp_path: Path, name: str
) -> None:
    operator.files = [("good", b"1"), (name, b"2")]
    with pytest.raises(InvalidInput, match="not a file name"):
        client.export("fashion", "", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_daemon_says_how_to_start_one(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with OperatorClient(tmp_path) as client, pytest.raises(Unavailable, match="farflung serve"):
        client.status()
    with OperatorClient(tmp_path) as client, pytest.raises(Unavailable, match="farflung serve"):
        next(client.watch())
    with pytest.raises(Unavailable, match="farflung init"):
        OperatorClient(tmp_path / "nothing")


def test_a_home_deep_down_is_reached_too(tmp_path: Path) -> None:
    home = tmp_path / ("d" * 60) / ("e" * 60)
    assert len(str(home)) > LONGEST_PATH
    with fake_daemon(home), OperatorClient(home) as client:
        assert client.status().sites == 2


def test_the_socket_has_its_name(tmp_path: Path) -> None:
    with OperatorSocket(tmp_path) as socket:
        assert socket.path == tmp_path / "run" / "operator.sock"
