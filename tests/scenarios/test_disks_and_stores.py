"""Disks that are full, read-only or damaged, databases that are locked: the cause is read, the work stays."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing

import pytest

from protos.faults import Fault
from tests.support.disk import small_disks_possible
from tests.support.faulty import ORCHESTRATOR
from tests.support.field import SITES, Field
from tests.support.reading import farflung
from tests.support.rigged import RiggedFederation, needs_mounts, with_mounts
from tests.support.scene import complete, ended, restored, without

pytestmark = [pytest.mark.xdist_group("disks"), pytest.mark.timeout(240)]

MIB = 1 << 20
STEPS = 2 * 120 // 20
LARGE = {"name": "blobs", "params": {"hidden": 60_000}}
"""3 MiB: too large for one message, and for what is left of a full disk."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    why = small_disks_possible()
    disks = {} if why else {"east": 300 * MIB, ORCHESTRATOR: 300 * MIB}
    field = Field(tmp_path_factory.mktemp("field"), kind=RiggedFederation, disks=disks)
    with field.federation:
        yield field


@pytest.fixture
def field(own: Field) -> Iterator[Field]:
    yield own
    for end in ("east", ORCHESTRATOR):
        own.federation.empty(end)
    restored(own)


needs_disks = pytest.mark.skipif(bool(small_disks_possible()), reason=small_disks_possible())


def held_at(field: Field, site: str, name: str, **changes: object) -> str:
    """A run whose round 1 waits for a site in the middle of its training."""
    (field.switches[site] / "gate").touch()
    run = field.federation.launch(field.config(name, rounds=1, **changes))
    field.federation.await_that((field.switches[site] / "reached").exists, "training", 60)
    return run


# -- full ---------------------------------------------------------------------------------------------


@needs_disks
def test_a_site_without_room_for_the_model_says_so(field: Field) -> None:
    field.federation.fill("east", leave_bytes=20 * MIB)
    run = field.federation.launch(field.config("no-room", rounds=1, task=LARGE))
    without(
        field, run, "east", "site east: a model of", "does not fit", "bytes are free at this site"
    )


@needs_disks
def test_a_site_whose_disk_fills_while_it_trains_says_so(field: Field) -> None:
    run = held_at(field, "east", "fills", task=LARGE)
    field.federation.fill("east")
    (field.switches["east"] / "gate").unlink()
    without(field, run, "east", "site east", "No space left on device")
    field.federation.empty("east")
    complete(field, field.federation.launch(field.config("room-again", rounds=1, task=LARGE)))


@needs_disks
def test_an_orchestrator_without_room_says_so_and_takes_the_work_later(field: Field) -> None:
    """Its disk fills while the sites train: what they finished stays with them, and counts in the end."""
    cohort = {"quorum": "all", "deadline_s": 120}
    run = held_at(field, "east", "full", task=LARGE, cohort=cohort)
    field.federation.fill(ORCHESTRATOR)
    (field.switches["east"] / "gate").unlink()
    # Whichever write comes first: a chunk, the ledger, the candidate.
    told = field.federation.until(
        lambda e: "No space left on device" in e.text or "disk is full" in e.text, timeout_s=30
    )
    assert told.level == "error"
    field.federation.empty(ORCHESTRATOR)
    view = field.federation.wait(run, 90)
    if view.state == "paused":  # what failed could be written down: the operator goes on
        assert "No space left" in view.reason or "disk is full" in view.reason
        field.federation.client.extend(run, 1)
    rounds = complete(field, run)
    assert {row.state for row in rounds[0].sites} == {"counted"}
    assert {site: field.steps(site) for site in SITES} == dict.fromkeys(SITES, STEPS)


@needs_disks
def test_a_round_that_would_not_fit_is_not_begun(field: Field) -> None:
    field.federation.fill(ORCHESTRATOR, leave_bytes=6 * MIB)
    run = field.federation.launch(field.config("too-large", rounds=1, task=LARGE))
    view, _, told = ended(field, run, "paused")
    for words in ("bytes are needed", "Make room"):
        assert words in view.reason
        assert words in told.text
    assert field.steps("north") == 0
    field.federation.empty(ORCHESTRATOR)
    field.federation.client.extend(run, 1)
    complete(field, run)


# -- read-only ------------------------------------------------------------------------------------------


@needs_mounts
def test_a_cache_on_a_read_only_mount_is_named(field: Field) -> None:
    """F4."""
    federation = field.federation
    assert isinstance(federation, RiggedFederation)
    cache = federation.folder("north") / "cache"
    federation.stop_site("north")
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    mount = f"mount --bind '{cache}' '{cache}' && mount -o remount,ro,bind '{cache}'"
    federation.before["north"] = with_mounts(mount)
    try:
        federation.start_site("north")
        run = federation.launch(field.config("read-only", rounds=1, task=LARGE))
        without(field, run, "north", "site north: cache: Read-only file system")
    finally:
        federation.before.clear()
        federation.stop_site("north")
        federation.start_site("north")


def test_a_store_that_becomes_read_only_is_named_and_the_work_counts_later(field: Field) -> None:
    field.federation.fail(
        ORCHESTRATOR, Fault("spool.finished", do="raise", error="EROFS", process="daemon")
    )
    cohort = {"quorum": "all", "deadline_s": 120}
    run = field.federation.launch(field.config("ro-store", rounds=1, task=LARGE, cohort=cohort))
    words = "the orchestrator can't write it down: Read-only file system"
    field.federation.until(lambda e: words in e.text, run, timeout_s=60)
    complete(field, run)
    assert {site: field.steps(site) for site in SITES} == dict.fromkeys(SITES, STEPS)


# -- locked and damaged ---------------------------------------------------------------------------------


def test_a_locked_ledger_is_named_and_waited_for(field: Field) -> None:
    """Somebody opened the database by hand and left a transaction open."""
    run = held_at(field, "east", "locked", cohort={"quorum": "all", "deadline_s": 120})
    ledger = field.federation.home.ledger
    words = "another process is writing to this ledger"
    with closing(sqlite3.connect(ledger, isolation_level=None, timeout=10)) as db:
        db.execute("BEGIN IMMEDIATE")
        (field.switches["east"] / "gate").unlink()
        field.federation.until(lambda e: words in e.text, timeout_s=60)
        db.execute("ROLLBACK")
    complete(field, run)
    assert {site: field.steps(site) for site in SITES} == dict.fromkeys(SITES, STEPS)


def test_a_model_that_the_disk_damaged_is_named(field: Field) -> None:
    first = field.federation.launch(field.config("damaged", rounds=1, task=LARGE))
    complete(field, first)
    model = field.federation.client.run(first).model
    data = next(field.federation.home.store.glob(f"artefacts/*/{model}.data"))
    good = data.read_bytes()
    data.write_bytes(good[:-5] + bytes([good[-5] ^ 1]) + good[-4:])
    told = farflung(field.federation, "verify", first)
    assert told.code == 74
    assert model[:12] in told.text
    field.federation.client.extend(first, 2)
    view, rounds, told = ended(field, first, "paused")
    assert rounds[0].state == "committed"
    for words in ("part of the model of round 1 is damaged", model[:12]):
        assert words in view.reason
        assert words in told.text
    data.write_bytes(good)
    field.federation.client.extend(first, 2)
    complete(field, first)


def test_a_spool_that_the_disk_damaged_costs_a_chunk(field: Field) -> None:
    federation = field.federation
    federation.forget_traces()
    run = held_at(field, "east", "spool", task=LARGE, cohort={"quorum": "all", "deadline_s": 120})
    told, others = ("daemon", "record.told"), len(SITES) - 1
    federation.await_that(
        lambda: federation.trace(ORCHESTRATOR).count(told) >= others, "the others counted", 60
    )
    federation.kill(ORCHESTRATOR, at="spool.chunk.written", hit=2, process="daemon")
    (field.switches["east"] / "gate").unlink()
    federation.await_fault(ORCHESTRATOR)
    payload = max(federation.home.spool.glob("east/*/payload*"), key=lambda f: f.stat().st_size)
    data = bytearray(payload.read_bytes())
    data[1000] ^= 1
    payload.write_bytes(data)
    federation.start_daemon()
    federation.await_sites(SITES)
    complete(field, run)
    assert field.steps("east") == STEPS


def test_a_deleted_cache_is_fetched_again(field: Field) -> None:
    federation = field.federation
    complete(field, federation.launch(field.config("cached", rounds=1, task=LARGE)))
    federation.stop_site("east")
    shutil.rmtree(federation.folder("east") / "cache")
    federation.start_site("east")
    complete(field, federation.launch(field.config("uncached", rounds=1, task=LARGE)))


def test_a_damaged_contribution_in_the_outbox_is_left_aside_and_trained_again(field: Field) -> None:
    federation = field.federation
    federation.fail("east", Fault("contribute.saying", do="kill", process="link"))
    cohort = {"quorum": "all", "deadline_s": 120}
    run = federation.launch(field.config("outbox", rounds=1, cohort=cohort))
    federation.await_fault("east")
    payload = max(
        federation.folder("east").glob("contributions/*/payload"), key=lambda f: f.stat().st_mtime
    )
    payload.write_bytes(payload.read_bytes()[:100])
    federation.revive()
    complete(field, run)
    assert field.steps("east") == 2 * STEPS
    log = (federation.folder("east") / "log" / "agent.log").read_text()
    assert "a damaged contribution is left aside" in log


def test_a_site_that_lost_its_state_says_so_and_goes_on(field: Field) -> None:
    """What a codec still owed is gone with the folder: the operator reads it in the round."""
    federation = field.federation
    strategy = [{"name": "int8"}]
    run = federation.launch(field.config("state", rounds=1, strategy=strategy))
    complete(field, run)
    federation.stop_site("east")
    shutil.rmtree(federation.folder("east") / "contributions")
    federation.start_site("east")
    federation.client.extend(run, 2)
    _, rounds, told = ended(field, run)
    assert not rounds[1].missing
    assert "site east: its state from before round 2 is not there any more" in told.text
