"""Samples of `make kill-anywhere`: kills change no bit of any model. And kills where a site joins."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.child import Child
from tests.chaos.arena import STEPS, Arena, Seen
from tests.chaos.cases import MOMENT, Case, Shape
from tests.chaos.kill_anywhere import ground
from tests.support.faulty import ORCHESTRATOR
from tests.support.field import SITES, Field

ANYWHERE = {
    "link": ("outbox.synced", "outbox.renamed", "contribute.sent", "fetch.chunk.written"),
    "trainer": ("train.stepped", "payload.written", "prepare.told", "perform.done"),
}
"""Some points that every round of a large model gets to."""


@pytest.fixture
def field(real: Field) -> Iterator[Field]:
    yield real
    real.federation.revive()
    real.clear()
    real.federation.await_sites(SITES)


@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(600)
def test_links_and_a_trainer_that_are_killed_in_a_run_change_no_bit(field: Field) -> None:
    """A daemon is killed in tests/integration/test_rounds.py, and in the slow test below."""
    draw = random.Random(3)
    cases = [Case("trainer", draw.choice(ANYWHERE["trainer"]), "large")]
    cases += [Case("link", at, "large") for at in draw.sample(ANYWHERE["link"], 2)]
    arena = Arena(
        field,
        {"large": Shape(30_000, 2)},
        known={"large": Seen({}, [], [], 1.0)},
        interval=STEPS,  # of these sites, which save no training that takes less than a second
    )
    came = arena.disturb(cases, seed=11)
    assert came.problem == ""
    assert {case.name for case in came.struck} == {case.name for case in cases}
    assert came.kills == len(cases)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sample_of_kills_changes_no_bit_and_costs_a_step_each(tmp_path: Path) -> None:
    with ground(tmp_path / "ground") as field:
        arena = Arena(field, {"large": Shape(30_000, 8)}, seed=2)
        reached = arena.cases("large")
        assert len({case.at for case in reached}) >= 100
        cases = [
            case
            for process, count in (("link", 8), ("trainer", 6), ("daemon", 6))
            for case in arena.draw.sample([c for c in reached if c.process == process], count)
        ]
        cases += [
            Case(process, MOMENT, "large", number=n)
            for n, process in enumerate(("daemon", "link", "trainer"))
        ]
        came = arena.disturb(cases, seed=12)
        assert came.problem == ""
        assert len(came.struck) >= 15


JOINING = (
    *(("link", f"join.{at}") for at in ("begun", "key.kept", "stored", "done")),
    *(("link", f"keys.{at}") for at in ("written", "replaced")),
    *(("daemon", f"enrol.{at}") for at in ("issued", "recorded")),
)


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(600)
def test_a_join_that_is_killed_anywhere_is_taken_up_with_the_same_token(field: Field) -> None:
    federation = field.federation
    for number, (process, point) in enumerate(JOINING):
        site = f"new-{number}"
        folder = federation.folder(site)
        folder.mkdir(parents=True, mode=0o700)
        token = folder / "token"
        token.write_text(federation.client.invite(site).token)
        token.chmod(0o600)
        (folder / "site.toml").write_text((federation.folder(SITES[0]) / "site.toml").read_text())

        def join(token: Path = token, site: str = site) -> Child:
            return federation._site_command(site, "join", f"@{token}")

        end = site if process == "link" else ORCHESTRATOR
        federation.kill(end, at=point, process=process)
        assert join().join(60) != 0
        assert federation.struck(end), point
        if process == "daemon":
            federation.daemon.join(60)
            federation.start_daemon()
        if point != "join.done":  # it has joined, and the token is used
            assert join().join(60) == 0, point
        federation.start_site(site)
        state = {row.name: row for row in federation.client.sites()}[site]
        assert state.state == "attached", point
        federation.stop_site(site)
        federation.client.revoke(site)
        del federation._children[site]
