"""Certificates that ended, agents that are two, versions that do not fit: who it is and what to do."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.ledger import Ledger
from protos.identity import (
    Identity,
    certificate_pem,
    fingerprint,
    issue,
    load_certificate,
    load_key,
)
from tests.support.field import SITES, Field
from tests.support.reading import farflung, serving
from tests.support.rigged import RiggedFederation
from tests.support.scene import complete, configured, problem, restored, without

pytestmark = [pytest.mark.xdist_group("identities"), pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    field = Field(tmp_path_factory.mktemp("field"), kind=RiggedFederation)
    with field.federation:
        yield field


@pytest.fixture
def field(own: Field) -> Iterator[Field]:
    yield own
    restored(own)


def trouble(field: Field, site: str) -> str:
    """What the daemon says keeps a site away."""
    return next(s.trouble for s in field.federation.client.sites() if s.name == site)


# -- certificates -----------------------------------------------------------------------------------------


def test_an_expired_certificate_is_named_at_both_ends(field: Field) -> None:
    """F9: a site that was switched off for longer than its certificate lasted."""
    federation, home = field.federation, field.federation.home
    keys = federation.folder("east") / "keys"
    federation.stop_site("east")
    good = (keys / "cert.pem").read_bytes()
    name = Identity(home.federation, "site", "east")
    public = load_key((keys / "key.pem").read_bytes()).public_key()
    past = datetime.now(UTC) - timedelta(days=2)
    short = issue(home.authority(), public, name, timedelta(days=1), now=past)
    ends = short.not_valid_after_utc.timestamp()
    with closing(Ledger.open(home.ledger)) as ledger:
        old = fingerprint(load_certificate(good))
        ledger.renew("east", old, fingerprint(short), certificate_pem(short), ends)
    (keys / "cert.pem").write_bytes(certificate_pem(short))
    try:
        federation.start_site("east", wait=False)
        words = "its certificate expired at"

        def said() -> bool:
            return (federation.folder("east") / "agent.sock").exists() and words in problem(
                field, "east"
            )

        federation.await_that(said, "the site says so", 30)
        assert "ask the operator for a new join token" in problem(field, "east")
        assert words in farflung(federation, "sites").text
        run = federation.launch(field.config("expired", rounds=1))
        without(
            field,
            run,
            "east",
            "gone: site east: its certificate expired at",
            "farflung invite east",
        )
    finally:
        federation.stop_site("east")
        shutil.rmtree(keys)
        federation.enroll(["east"])
        federation.start_site("east")


def test_a_site_that_is_revoked_in_mid_round_is_named(field: Field) -> None:
    federation = field.federation
    (field.switches["east"] / "gate").touch()
    run = federation.launch(field.config("revoked", rounds=1))
    federation.await_that((field.switches["east"] / "reached").exists, "training", 60)
    federation.client.revoke("east")
    without(field, run, "east", "site east", "revoked")
    federation.await_that(lambda: "revoked" in problem(field, "east"), "the site says so", 30)
    federation.stop_site("east")
    shutil.rmtree(federation.folder("east") / "keys")
    federation.enroll(["east"])
    federation.start_site("east")
    field.clear()
    complete(field, federation.launch(field.config("invited-again", rounds=1)))


# -- two of one -------------------------------------------------------------------------------------------


def test_two_agents_with_one_identity_are_named_and_one_is_turned_away(field: Field) -> None:
    """A site's folder was copied to a second machine."""
    federation = field.federation
    assert isinstance(federation, RiggedFederation)
    copy = federation.root / "sites" / "east-copy"
    shutil.copytree(
        federation.folder("east"), copy, ignore=shutil.ignore_patterns("*.sock", "lock", "log")
    )
    federation._site_command("east-copy", "run")
    words = "site east: two agents use its certificate"
    try:
        told = federation.until(lambda e: e.text.startswith(words), timeout_s=60)
        assert told.level == "error"
        assert "Stop one of them" in trouble(field, "east")
        assert words in farflung(federation, "sites").text
        federation.await_that(lambda: words in problem(field, "east"), "the site says so", 30)
        run = federation.launch(field.config("two-agents", rounds=1))
        complete(field, run)
        attached = [
            e for e in federation.client.watch(follow=False) if e.text == "site east is attached"
        ]
        assert len(attached) < 20, "they do not take turns for ever"
    finally:
        federation.stop_site("east-copy")
        del federation._children["east-copy"]
    federation.await_that(lambda: not problem(field, "east"), "the first one is let in", 60)


def test_a_second_daemon_on_one_home_is_refused_by_name(field: Field) -> None:
    told = serving(field.federation)
    assert told.code == 75
    assert f"is in use by process {field.federation.daemon.pid}" in told.text


def test_a_lock_that_a_killed_daemon_left_blocks_nobody(field: Field) -> None:
    """F3: what is locked is the file and not its content."""
    federation = field.federation
    federation.kill_daemon()
    assert (federation.home.path / "lock").read_text() == str(federation.daemon.pid)
    federation.kill("east")
    federation.start_daemon()
    federation.start_site("east", wait=False)
    federation.await_sites(SITES)
    complete(field, federation.launch(field.config("after-kill", rounds=1)))


# -- versions -----------------------------------------------------------------------------------------------

OTHER_PROTOCOL = """
import sys
from site_agent.link import hello, stream
hello.PROTOCOL = stream.PROTOCOL = {protocol}
from site_agent.cli import main
main()
"""


@pytest.mark.parametrize("protocol", [0, 2], ids=["older", "newer"])
def test_an_agent_of_another_protocol_is_named_at_both_ends(field: Field, protocol: int) -> None:
    federation = field.federation
    federation.stop_site("east")
    program = [sys.executable, "-c", textwrap.dedent(OTHER_PROTOCOL).format(protocol=protocol)]
    federation._start("east", [*program, "run", "--home", str(federation.folder("east"))])
    words = f"speaks protocol {protocol}, this orchestrator"
    try:
        told = federation.until(lambda e: words in e.text, timeout_s=60)
        assert "upgrade the older one" in told.text
        federation.await_that(lambda: words in problem(field, "east"), "the site says so", 30)
        run = federation.launch(field.config(f"protocol-{protocol}", rounds=1))
        without(field, run, "east", "gone: site east: its agent", "upgrade the older one")
    finally:
        federation.stop_site("east")
        federation.start_site("east")


def test_an_upgrade_under_a_running_agent_is_named(field: Field) -> None:
    """The trainer that is started next is of the new version, the agent still of the old one."""
    newer = f'exec {sys.executable} -m site_agent.trainer "$@" --link-version 0.0.1'
    command = f'[trainer]\ncommand = ["sh", "-c", {newer!r}, "sh"]\n'
    with configured(field, "east", lambda text: text.replace("[trainer]\n", command)):
        run = field.federation.launch(field.config("upgraded", rounds=1))
        without(field, run, "east", "the trainer can't begin", "is still 0.0.1: restart the agent")
