"""Clocks that are set, names that vanish, lines that hang: who is out of reach and why is read."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.port import free_port
from tests.support.clock import clocks_possible
from tests.support.faulty import ORCHESTRATOR
from tests.support.field import SITES, Field
from tests.support.reading import farflung, serving
from tests.support.rigged import RiggedFederation, needs_mounts, with_mounts
from tests.support.scene import complete, problem, restored

pytestmark = [pytest.mark.xdist_group("network"), pytest.mark.timeout(240)]

STEPS = 2 * 120 // 20
HOUR = 3600.0
ALL = {"quorum": "all", "deadline_s": 120}
LARGE = {"name": "blobs", "params": {"hidden": 60_000}}

needs_clocks = pytest.mark.skipif(bool(clocks_possible()), reason=clocks_possible())


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    field = Field(
        tmp_path_factory.mktemp("field"),
        kind=RiggedFederation,
        lines=True,
        clocks=not clocks_possible(),
    )
    with field.federation:
        yield field


@pytest.fixture
def field(own: Field) -> Iterator[Field]:
    yield own
    for site in SITES:
        own.federation.mend(site)
    if not clocks_possible():
        for end in (*SITES, ORCHESTRATOR):
            own.federation.turn_clock(end, 0)
    restored(own)


def held_at(field: Field, site: str, name: str, **changes: object) -> str:
    """A run whose round 1 waits for a site in the middle of its training."""
    (field.switches[site] / "gate").touch()
    run = field.federation.launch(field.config(name, rounds=1, **changes))
    field.federation.await_that((field.switches[site] / "reached").exists, "training", 60)
    return run


def gone(field: Field, site: str) -> bool:
    return any(s.name == site and s.state == "gone" for s in field.federation.client.sites())


def nothing_twice(field: Field) -> None:
    assert {site: field.steps(site) for site in SITES} == dict.fromkeys(SITES, STEPS)


# -- clocks -----------------------------------------------------------------------------------------------


@needs_clocks
@pytest.mark.parametrize("hours", [-0.13, 30.0], ids=["back", "ahead"])
@pytest.mark.parametrize("end", ["east", ORCHESTRATOR])
def test_a_clock_that_is_set_in_mid_round_ends_nothing(
    field: Field, end: str, hours: float
) -> None:
    run = held_at(field, "east", f"clock-{end}-{hours}", cohort=ALL)
    field.federation.turn_clock(end, hours * HOUR)
    (field.switches["east"] / "gate").unlink()
    rounds = complete(field, run)
    assert rounds[0].attempt == 1
    nothing_twice(field)


@needs_clocks
def test_a_daemon_that_starts_with_a_wrong_clock_is_not_believed_and_loses_nothing(
    field: Field,
) -> None:
    """Its clock went a day ahead while it was down: what it signs is of tomorrow."""
    run = held_at(field, "east", "clock-restart", cohort=ALL)
    field.federation.kill_daemon()
    field.federation.turn_clock(ORCHESTRATOR, 24 * HOUR)
    field.federation.start_daemon()
    field.federation.await_that(
        lambda: "one of the two clocks is wrong" in problem(field, "east"), "it says so", 60
    )
    field.federation.kill_daemon()
    field.federation.turn_clock(ORCHESTRATOR, 0)
    field.federation.start_daemon()
    field.federation.await_sites(SITES)
    (field.switches["east"] / "gate").unlink()
    rounds = complete(field, run)
    assert rounds[0].attempt == 1
    nothing_twice(field)


def _answers(field: Field, site: str) -> bool:
    return (field.federation.folder(site) / "agent.sock").exists()


# -- lines ------------------------------------------------------------------------------------------------


def test_a_half_open_line_is_noticed_and_the_work_arrives(field: Field) -> None:
    """Nothing passes and nothing is closed, as when a firewall forgets a connection."""
    run = held_at(field, "east", "half-open", cohort=ALL)
    field.federation.freeze("east")
    field.federation.await_that(lambda: gone(field, "east"), "gone", 30)
    (field.switches["east"] / "gate").unlink()
    # New connections hang as the old ones do; the site finds out by itself, and goes on by itself.
    field.federation.await_that(lambda: bool(problem(field, "east")), "the site says so", 90)
    field.federation.mend("east")
    complete(field, run)
    nothing_twice(field)


def test_a_line_that_is_away_for_a_while_costs_nothing(field: Field) -> None:
    """F6: a VPN that drops in mid-round."""
    run = held_at(field, "east", "vpn", cohort=ALL)
    field.federation.sever("east")
    field.federation.await_that(lambda: gone(field, "east"), "gone", 30)
    (field.switches["east"] / "gate").unlink()
    address = field.federation.lines["east"].address
    field.federation.await_that(
        lambda: problem(field, "east").startswith(f"orchestrator {address}: "),
        "the site says so",
        30,
    )
    field.federation.mend("east")
    complete(field, run)
    nothing_twice(field)


def test_an_upload_that_is_cut_again_and_again_arrives_once(field: Field) -> None:
    run = held_at(field, "east", "cut", cohort=ALL, task=LARGE)
    line = field.federation.lines["east"]
    field.federation.throttle("east", mbit_per_s=20, way="up")
    (field.switches["east"] / "gate").unlink()
    for _ in range(3):
        line.up.await_bytes(400_000, 60)
        field.federation.cut("east")
    field.federation.mend("east")
    complete(field, run)
    nothing_twice(field)


def test_bytes_that_a_line_changes_never_count(field: Field) -> None:
    run = held_at(field, "east", "garbled", cohort=ALL, task=LARGE)
    done = field.federation.corrupt("east", way="up", after=500_000)
    (field.switches["east"] / "gate").unlink()
    assert done.wait(60)
    complete(field, run)
    nothing_twice(field)


# -- names and addresses ----------------------------------------------------------------------------------


@needs_mounts
def test_a_name_that_is_not_resolved_any_more_is_named(field: Field, tmp_path: Path) -> None:
    """The orchestrator's name vanishes from the site's resolver while the site is attached."""
    federation = field.federation
    assert isinstance(federation, RiggedFederation)
    names, switch = tmp_path / "hosts", tmp_path / "nsswitch.conf"
    names.write_text("127.0.0.1 localhost hub.example.test\n")
    switch.write_text("hosts: files\n")
    config = federation.folder("north") / "site.toml"
    before = config.read_text()
    port = federation.lines["north"].port
    federation.stop_site("north")
    config.write_text(
        before.replace(
            f'address = "127.0.0.1:{port}"',
            f'address = "hub.example.test:{port}"\nserver_name = "localhost"',
        )
    )
    assert "hub.example.test" in config.read_text()
    federation.before["north"] = with_mounts(
        f"mount --bind '{names}' /etc/hosts", f"mount --bind '{switch}' /etc/nsswitch.conf"
    )
    federation.variables["north"] = {"GRPC_DNS_RESOLVER": "native", "no_proxy": "hub.example.test"}
    try:
        federation.start_site("north")
        run = held_at(field, "north", "dns", cohort=ALL)
        names.write_text("127.0.0.1 localhost\n")
        federation.cut("north")
        (field.switches["north"] / "gate").unlink()
        federation.await_that(lambda: gone(field, "north"), "gone", 30)
        words = "orchestrator hub.example.test"
        federation.await_that(lambda: words in problem(field, "north"), "the site says so", 60)
        assert "Name or service not known" in problem(field, "north")
        names.write_text("127.0.0.1 localhost hub.example.test\n")
        complete(field, run)
        nothing_twice(field)
    finally:
        federation.before.clear()
        federation.variables.clear()
        federation.stop_site("north")
        config.write_text(before)
        federation.start_site("north")


def test_a_port_that_is_taken_is_named(field: Field) -> None:
    federation = field.federation
    federation.stop_daemon()
    host, _, port = federation.home.config.listen.bind.rpartition(":")
    with socket.create_server((host, int(port))):
        told = serving(federation)
        assert told.code not in (0, 70)
        assert port in told.text
        found = farflung(federation, "doctor", "--json")
        assert f"{host}:{port} can't be bound" in found.text
    federation.start_daemon()
    federation.await_sites(SITES)


def test_a_daemon_at_another_address_is_not_found_and_said_so(field: Field) -> None:
    federation = field.federation
    before = federation.home.config_file.read_text()
    old = federation.home.config.listen.bind
    run = held_at(field, "east", "moved", cohort=ALL)
    federation.stop_daemon()
    new = f"127.0.0.1:{free_port()}"
    federation.home.config_file.write_text(before.replace(old, new))
    assert json.loads(json.dumps(federation.start_daemon()))["address"] == new
    (field.switches["east"] / "gate").unlink()
    federation.await_that(lambda: "is it running" in problem(field, "east"), "the site says so", 60)
    for site in SITES:  # what a site's owner does: another address in site.toml
        federation.lines[site].target = new
    complete(field, run)
    nothing_twice(field)
    federation.stop_daemon()
    federation.home.config_file.write_text(before)
    for site in SITES:
        federation.lines[site].target = old
    federation.start_daemon()
    federation.await_sites(SITES)
