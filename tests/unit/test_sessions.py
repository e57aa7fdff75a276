"""Who is here: an agent that comes back, one that was started anew, and two at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orchestrator.sessions import Session, Sessions
from protos.errors import Conflict
from protos.v1 import site_pb2


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    sessions = Sessions(3600.0, lambda site: None, lambda site: None)
    yield sessions
    sessions.drain("the end")


def agent(instance: str, site: str = "east") -> Session:
    return Session(site, "fingerprint", site_pb2.Hello(instance=instance))


def test_an_agent_that_connects_again_takes_its_own_place(sessions: Sessions) -> None:
    for _ in range(3):
        newest = agent("a")
        sessions.attach(newest)
        assert sessions.get("east") is newest


def test_an_agent_that_was_started_anew_takes_the_place_of_the_last(sessions: Sessions) -> None:
    for instance in ("a", "b", "c"):
        newest = agent(instance)
        sessions.attach(newest)
        assert sessions.get("east") is newest


def test_of_two_agents_the_one_whose_place_was_taken_is_turned_away(sessions: Sessions) -> None:
    sessions.attach(agent("a"))
    copy = agent("b")
    sessions.attach(copy)
    for _ in range(2):
        with pytest.raises(Conflict, match="site east: two agents use its certificate"):
            sessions.attach(agent("a"))
    assert sessions.get("east") is copy
    sessions.attach(agent("a", "west"))
    sessions.detach(copy)  # the copy was stopped
    first = agent("a")
    sessions.attach(first)
    assert sessions.get("east") is first


def test_agents_that_do_not_say_which_they_are_take_places_as_ever(sessions: Sessions) -> None:
    for instance in ("a", "", "b", "", "a"):
        newest = agent(instance)
        sessions.attach(newest)
        assert sessions.get("east") is newest
