"""What changes often is published now and then, and what changed last always."""

import queue
import threading

import pytest

from orchestrator.publisher import Publisher


class Thing:
    """Something that changes, and what was seen of it."""

    def __init__(self) -> None:
        self.value = 0
        self.seen: queue.Queue[int] = queue.Queue()

    def publish(self) -> None:
        self.seen.put(self.value)


def test_the_first_change_is_seen_at_once_and_the_last_one_always() -> None:
    thing = Thing()
    publisher = Publisher(thing.publish, every_s=0.2)
    thing.value = 1
    publisher.soon()
    assert thing.seen.get(timeout=10) == 1
    for thing.value in range(2, 1000):
        publisher.soon()
    last = 0
    count = 0
    while last != 999:
        last, count = thing.seen.get(timeout=10), count + 1
    assert count < 100
    publisher.close()
    assert thing.seen.empty()


def test_now_is_now_and_stands_for_what_was_due() -> None:
    thing = Thing()
    publisher = Publisher(thing.publish, every_s=3600)
    publisher.soon()
    assert thing.seen.get(timeout=10) == 0
    thing.value = 1
    publisher.soon()  # in an hour
    thing.value = 2
    publisher.now()
    assert thing.seen.get_nowait() == 2
    publisher.close()
    assert thing.seen.empty()


@pytest.mark.filterwarnings("error")
def test_a_failure_is_logged_and_the_next_change_is_seen(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen = threading.Event()

    def publish() -> None:
        if not seen.is_set():
            seen.set()
            raise ValueError("no such round")

    thing = Thing()

    def both() -> None:
        publish()
        thing.publish()

    publisher = Publisher(both, every_s=0.0)
    publisher.soon()
    assert seen.wait(10)
    publisher.soon()
    assert thing.seen.get(timeout=10) == 0
    publisher.close()
    assert "can't be published" in caplog.text
