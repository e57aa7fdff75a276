"""What is said on the control stream, and in which order."""

import threading

import pytest

from protos.errors import InvalidInput
from protos.v1 import site_pb2
from site_agent.config import NetworkSection
from site_agent.link import outgoing as outgoing_module
from site_agent.link.outgoing import HEARTBEAT_S, PROGRESS_S, STATE_S, Outgoing, Said
from site_agent.link.wire import Wire, backoff, channel_options, host_of, is_loopback


def progress(plan: str, state: int, done: float = 0.0) -> site_pb2.Progress:
    return site_pb2.Progress(plan_id=plan, state=state, done=done)  # type: ignore[arg-type]


def outgoing(paused: bool = False, noted: list[int] | None = None) -> Outgoing:
    def note(told: site_pb2.Progress) -> None:
        if noted is not None:
            noted.append(told.state)

    stream = Outgoing(site_pb2.Hello(protocol=1), lambda: paused, note)
    assert next(stream).WhichOneof("kind") == "hello"
    return stream


def test_messages_come_in_order_and_before_progress() -> None:
    stream = outgoing()
    stream.progress(progress("p", 3))  # its time comes
    stream.say(Said(outcome=site_pb2.Outcome(plan_id="a")))
    stream.say(Said(outcome=site_pb2.Outcome(plan_id="b")))
    assert [next(stream).outcome.plan_id for _ in range(2)] == ["a", "b"]
    assert next(stream).progress.plan_id == "p"


def test_only_the_newest_progress_of_a_plan_is_said() -> None:
    stream = outgoing()
    for done in range(5):
        stream.progress(progress("p", 3, done))
    stream.progress(progress("q", 3, 9))
    said = [next(stream).progress for _ in range(2)]
    assert [(p.plan_id, p.done) for p in said] == [("p", 4), ("q", 9)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(outgoing_module, "monotonic", lambda: now[0])
    return now


def test_a_new_state_is_said_soon_and_the_same_one_now_and_then(clock: list[float]) -> None:
    stream = outgoing(paused=True)
    stream.progress(progress("p", 3, 1))
    clock[0] += STATE_S
    assert next(stream).progress.done == 1
    stream.progress(progress("q", 4))
    clock[0] += STATE_S
    stream.progress(progress("p", 3, 2))
    assert next(stream).progress.plan_id == "q"
    clock[0] += STATE_S
    stream.progress(progress("p", 5, 3))
    assert next(stream).progress.done == 3
    stream.progress(progress("p", 5, 4))
    clock[0] += PROGRESS_S
    assert next(stream).progress.done == 4


def test_a_state_that_is_over_at_once_is_not_said(clock: list[float]) -> None:
    noted: list[int] = []
    stream = outgoing(noted=noted)
    for state in (1, 2, 3, 4):
        stream.progress(progress("p", state))
    clock[0] += STATE_S
    assert next(stream).progress.state == 4
    for state in (5, 6):
        stream.progress(progress("p", state))
    clock[0] += STATE_S
    assert next(stream).progress.state == 6
    stream.progress(progress("p", 6, 1.0))
    clock[0] += PROGRESS_S
    assert next(stream).progress.done == 1.0
    assert noted == [4, 6], "what did not leave, or is no other state, is not noted"
    clock[0] += HEARTBEAT_S
    assert next(stream).WhichOneof("kind") == "heartbeat"


def test_who_waits_is_woken_only_for_what_is_due_before(clock: list[float]) -> None:
    stream = outgoing()
    woken: list[int] = []
    stream._condition.notify_all = lambda: woken.append(1)  # type: ignore[method-assign]

    def wait(timeout: float) -> None:
        stream.progress(progress("p", 1))
        assert len(woken) == 1, "it waited for a heartbeat, and this is due before"
        stream._wakes = clock[0] + STATE_S / 2
        stream.progress(progress("p", 2))
        assert len(woken) == 1
        clock[0] += timeout

    stream._condition.wait = wait  # type: ignore[method-assign,assignment]
    assert next(stream).progress.state == 2


def test_of_a_plan_that_is_over_nothing_is_said(clock: list[float]) -> None:
    stream = outgoing()
    stream.progress(progress("p", 1))
    stream.progress(progress("q", 1))
    stream.forget("p")
    clock[0] += STATE_S
    assert next(stream).progress.plan_id == "q"
    clock[0] += HEARTBEAT_S
    assert next(stream).WhichOneof("kind") == "heartbeat"


def test_heartbeats_say_whether_the_site_is_paused() -> None:
    stream = outgoing(paused=True)
    stream.beat(0.01)
    assert next(stream).heartbeat.paused


def test_a_heartbeat_that_comes_back_tells_the_round_trip() -> None:
    stream = outgoing()
    assert stream.round_trip_s is None
    stream.beat(0.001)
    first, second = (next(stream).heartbeat.sequence for _ in range(2))
    assert stream.round_trip_s is None  # an orchestrator that sends none back
    stream.came_back(first)
    assert stream.round_trip_s is not None
    away = stream.round_trip_s  # the second one is on its way still, and longer and longer
    while stream.round_trip_s == away:
        pass
    assert stream.round_trip_s > away
    stream.came_back(second)
    settled = stream.round_trip_s
    stream.came_back(second)
    stream.came_back(999)
    assert stream.round_trip_s == settled


def test_it_ends_when_it_is_closed() -> None:
    stream = outgoing()
    said: list[Said] = []
    reader = threading.Thread(target=lambda: said.extend(stream))
    reader.start()
    stream.close()
    reader.join(10)
    assert not reader.is_alive()
    assert said == []


def test_waits_double_up_to_a_bound_and_are_drawn() -> None:
    waits = backoff(0.2, 15.0)
    found = [next(waits) for _ in range(12)]
    for wait, bound in zip(found, [0.2 * 2**k for k in range(12)], strict=True):
        assert min(bound, 15) / 2 <= wait <= min(bound, 15)


def test_addresses() -> None:
    assert host_of("[::1]:80") == "::1"
    assert is_loopback("localhost:1")
    assert not is_loopback("orchestrator.example:1")
    named = dict(channel_options("tunnel.example:1", "localhost"))
    assert named["grpc.ssl_target_name_override"] == "localhost"
    assert "grpc.enable_http_proxy" not in named


class Keys:
    address = "train.example.org:8470"


def wire(**network: str) -> Wire:
    return Wire(Keys, NetworkSection(**network))  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("told", "network", "dialled"),
    [
        ("", {}, "train.example.org:8470"),
        (":8472", {}, "train.example.org:8472"),
        ("bulk.example.org:9000", {}, "bulk.example.org:9000"),
        ("[fe80::1]:9000", {}, "[fe80::1]:9000"),
        (":8472", {"address": "10.0.0.1:7000"}, "10.0.0.1:8472"),
        (":8472", {"address": "[::1]:7000"}, "[::1]:8472"),
        (":8472", {"bulk_address": "10.0.0.1:7002"}, "10.0.0.1:7002"),
        ("", {"bulk_address": "10.0.0.1:7002"}, "train.example.org:8470"),
    ],
)
def test_where_models_and_contributions_go(
    told: str, network: dict[str, str], dialled: str
) -> None:
    line = wire(**network)
    before = line.bulk_address
    assert line.move_bulk(told) == (dialled != before)
    assert line.bulk_address == dialled
    assert not line.move_bulk(told)
    assert line.move_bulk("") == (dialled != before)


@pytest.mark.parametrize(
    "told", ["8472", "host", "a b:1", "host:", "host:port", "x/y", "fe80::1:9"]
)
def test_an_orchestrator_that_says_nonsense_is_told_so(told: str) -> None:
    with pytest.raises(InvalidInput, match="which is not host:port"):
        wire().move_bulk(told)
