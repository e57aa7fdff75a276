"""What keeps a site from taking part is told once, and shown as long as it lasts."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import troubles as module
from orchestrator.troubles import Troubles
from tests.support.workbench import Workbench


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(tmp_path)
    bench.enrol("north", "south")
    yield bench
    bench.close()


@pytest.fixture
def notes() -> list[tuple[str, str, str]]:
    return []


@pytest.fixture
def troubles(bench: Workbench, notes: list[tuple[str, str, str]]) -> Troubles:
    return Troubles(bench.ledger, lambda *said: notes.append(said))


def test_each_trouble_is_told_once(troubles: Troubles, notes: list[tuple[str, str, str]]) -> None:
    for text in ("full", "full", "empty", "full"):
        troubles.tell("north", text)
    assert notes == [("error", "north", text) for text in ("full", "empty", "full")]
    assert troubles.of("north", attached=True) == "full"
    assert troubles.of("south", attached=True) == ""
    troubles.over("north")
    assert troubles.of("north", attached=True) == ""
    troubles.tell("north", "full")
    assert len(notes) == 4


def test_of_what_nothing_more_is_heard_is_over(
    troubles: Troubles, notes: list[tuple[str, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    troubles.tell("north", "full")
    monkeypatch.setattr(module, "LASTS_S", 0.0)
    assert troubles.of("north", attached=True) == ""
    troubles.tell("north", "full")
    assert len(notes) == 2


def test_an_expired_certificate_is_a_reason_to_be_away(bench: Workbench) -> None:
    troubles = Troubles(bench.ledger, lambda *_: None)
    assert troubles.of("north", attached=False) == ""
    row = bench.ledger.site("north")
    assert row.certificate_expires is not None
    pem = b"pem"
    bench.ledger.renew("north", "f-north", "newer", pem, time.time() - 60)
    why = troubles.of("north", attached=False)
    assert "its certificate expired at" in why
    assert "farflung invite north" in why
    assert troubles.of("north", attached=True) == ""
    assert troubles.of("nobody", attached=False) == ""
    bench.ledger.revoke("south")
    assert "revoked" in troubles.of("south", attached=False)
