"""A gRPC that never ends a call: its connection is left behind, and the site attaches again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.errors import Unavailable
from protos.identity import JoinToken
from protos.v1 import site_pb2
from site_agent.config import NetworkSection
from site_agent.link import enrolment
from site_agent.link import stream as stream_module
from site_agent.link.journal import Journal
from site_agent.link.stream import LEFT_BEHIND, PROTOCOL, Stream
from site_agent.link.wire import Wire
from tests.support.tiny_orchestrator import TinyOrchestrator

pytestmark = pytest.mark.timeout(60)


class Stuck:
    """A real channel whose close does not return until it is released, as gRPC's sometimes does."""

    def __init__(self, channel: grpc.Channel, released: threading.Event) -> None:
        self._channel, self._released = channel, released

    def __getattr__(self, name: str) -> Any:
        return getattr(self._channel, name)

    def close(self) -> None:
        self._released.wait()
        self._channel.close()


class Site:
    """A site's control stream, whose first connections get stuck."""

    def __init__(self, folder: Path, orchestrator: TinyOrchestrator, stuck: int) -> None:
        self.released, self.heard = threading.Event(), []
        self.attached: list[bool] = []
        keys = enrolment.join(JoinToken.decode(orchestrator.invite("north")), folder / "keys")
        opened: list[grpc.Channel] = []

        class Line(Wire):
            def open(line) -> Any:  # noqa: N805
                opened.append(super().open())
                return Stuck(opened[-1], self.released) if len(opened) <= stuck else opened[-1]

        self.stream = Stream(
            Line(lambda: keys, NetworkSection()),
            lambda: site_pb2.Hello(protocol=PROTOCOL),
            self.heard.append,
            lambda welcome: self.attached.append(welcome is not None),
            lambda: False,
            lambda _: None,
            Journal(folder / "agent.log", "north"),
        )


@pytest.fixture
def orchestrator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyOrchestrator]:
    monkeypatch.setattr(stream_module, "LET_GO_S", 0.3)
    monkeypatch.setattr(stream_module, "_LOOK_S", 0.05)
    orchestrator = TinyOrchestrator(tmp_path / "orchestrator")
    orchestrator.start()
    yield orchestrator
    orchestrator.stop()


def test_a_connection_that_does_not_end_is_left_behind(
    orchestrator: TinyOrchestrator, tmp_path: Path
) -> None:
    site = Site(tmp_path, orchestrator, stuck=1)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.stream.run)
        orchestrator.until(lambda: len(orchestrator.streams) == 1, "the first stream")
        orchestrator.streams[0].put(None)  # it ends, and can't be closed
        orchestrator.until(lambda: len(orchestrator.streams) == 2, "the second stream")
        beats = len(orchestrator.said)
        orchestrator.until(lambda: len(orchestrator.said) > beats + 2, "its heartbeats")
        assert site.attached == [True, False, True]
        site.released.set()  # what comes of the first one now is nobody's business any more
        orchestrator.push(drain=site_pb2.Drain(reason="heard"))
        beats = len(orchestrator.said)
        orchestrator.until(lambda: len(orchestrator.said) > beats + 2, "its heartbeats")
        assert [message.drain.reason for message in site.heard] == ["heard"]
        assert site.stream.attached
        assert site.attached == [True, False, True]
        site.stream.stop()
        running.result(20)
    assert "a connection is left behind" in (tmp_path / "agent.log").read_text()


def test_where_none_ends_a_new_process_is_wanted(
    orchestrator: TinyOrchestrator, tmp_path: Path
) -> None:
    site = Site(tmp_path, orchestrator, stuck=99)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.stream.run)
        for number in range(LEFT_BEHIND):
            orchestrator.until(lambda n=number: len(orchestrator.streams) > n, "another stream")
            orchestrator.streams[number].put(None)
        with pytest.raises(Unavailable, match="gRPC did not end the last connection"):
            running.result(30)
        site.released.set()
