"""A minute of `make chaos`, and what garbles bytes on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protos.faults import Fault
from tests.chaos.gale import STUCK_S
from tests.chaos.storm import storm
from tests.support.faulty import ORCHESTRATOR
from tests.support.field import SITES, Field

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_minute_of_faults_loses_and_changes_nothing(tmp_path: Path) -> None:
    outcome = storm(tmp_path, minutes=1, rate=600, seed=7, calm_rounds=2)
    assert outcome.sound, (outcome.line(), outcome.gale.why, outcome.problems)
    assert outcome.gale.faults.total() >= 3


def test_bytes_that_are_garbled_anywhere_change_no_bit(tmp_path: Path) -> None:
    """On the line TLS ends the connection; on a disk the digest tells; either is sent or made again."""
    field = Field(tmp_path / "f", lines=True)
    federation = field.federation

    def config(name: str) -> dict[str, Any]:
        return field.config(
            name,
            rounds=1,
            task={"name": "blobs", "params": {"hidden": 100_000}},
            cohort={"quorum": "all", "deadline_s": 300, "attempts": 10},
            strategy=[],
        )

    def models(run: str) -> dict[int, str]:
        assert federation.wait(run, STUCK_S).state == "finished"
        return federation.committed(run)

    with federation:
        run = federation.launch(config("garbled"))
        models(run)
        for number, (how, way) in enumerate(
            [(h, w) for h in ("corrupt", "duplicate", "reorder") for w in ("up", "down")], 2
        ):
            # 4.8 MB go either way in a round: this is in the middle of the model.
            done = [getattr(federation, how)(site, way, 2_000_000) for site in SITES]
            resets = sum(len(federation.lines[site].connections) for site in SITES)
            federation.client.extend(run, number)
            models(run)
            assert all(event.is_set() for event in done), (how, way)
            dialled = sum(len(federation.lines[site].connections) for site in SITES)
            assert dialled >= resets + len(SITES), "a connection went on"
        before = {site: federation.lines[site].up.nbytes for site in SITES}
        federation.fail(ORCHESTRATOR, Fault("spool.chunk.written", hit=2))
        federation.client.extend(run, 8)
        federation.await_fault(ORCHESTRATOR)
        federation.rot(ORCHESTRATOR, "spool")
        federation.revive()
        models(run)
        assert sum(federation.lines[site].up.nbytes - before[site] for site in SITES) < 25_000_000
        federation.fail("east", Fault("outbox.admitted"))
        federation.client.extend(run, 9)
        federation.await_fault("east")
        federation.rot("east", "outbox")
        federation.revive()
        found = models(run)
        assert federation.client.verify(run).problems == ()
    other = Field(tmp_path / "g")
    with other.federation:
        run = other.federation.launch({**config("garbled"), "rounds": 9})
        assert other.federation.wait(run, STUCK_S).state == "finished"
        assert other.federation.committed(run) == found
