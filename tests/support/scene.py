"""What the scenarios share: the end of a run, and what is read of it in all the places."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from orchestrator.views import Round, Run
from protos.errors import FarflungError
from site_agent.cli.ring import ring
from site_agent.home import Home
from tests.support.faulty import ORCHESTRATOR
from tests.support.field import SITES, Field
from tests.support.reading import Reading, farflung, launching, page

INCOMPLETE = 75
"""Exit code of a run that ended, but not with everybody."""


def restored(field: Field) -> None:
    """Every fault is over, and everybody there."""
    field.clear()
    for end in (*SITES, ORCHESTRATOR):
        field.federation.resume(end)
        field.federation.forgive(end)
    field.federation.revive()
    field.federation.await_sites(SITES)


@contextmanager
def configured(field: Field, site: str, change: Callable[[str], str]) -> Iterator[None]:
    """A site's agent runs with a changed site.toml, and then again as before."""
    config = field.federation.folder(site) / "site.toml"
    before = config.read_text()
    field.federation.stop_site(site)
    config.write_text(change(before))
    try:
        field.federation.start_site(site)
        yield
    finally:
        field.federation.stop_site(site)
        config.write_text(before)
        field.federation.start_site(site)


def ended(field: Field, run: str, state: str = "finished") -> tuple[Run, list[Round], Reading]:
    """A run's end, its rounds, and what whoever launched it reads."""
    view = field.federation.wait(run, 120)
    assert view.state == state, view.reason
    return view, field.federation.rounds(run), launching(field.federation, run)


def without(field: Field, run: str, site: str, *words: str) -> list[Round]:
    """The run ended without a site in round 1, which is said wherever an operator looks."""
    _, rounds, told = ended(field, run)
    assert set(rounds[0].missing) == {site}, rounds[0].missing
    assert told.code == INCOMPLETE
    listed, shown = farflung(field.federation, "rounds", run).text, page(field.federation, run)
    for word in words:
        assert word in rounds[0].missing[site], rounds[0].missing
        assert word in told.text, told.text
        assert word in listed, listed
        assert word in shown, shown
    counted = {row.site for row in rounds[0].sites if row.state == "counted"}
    assert counted == set(SITES) - {site}
    return rounds


def complete(field: Field, run: str) -> list[Round]:
    """The run ended with everybody in every round, and the ledger is whole."""
    _, rounds, told = ended(field, run)
    assert not any(round.missing for round in rounds), [round.missing for round in rounds]
    assert told.code == 0, told.text
    assert farflung(field.federation, "verify", run).code == 0
    return rounds


def problem(field: Field, site: str) -> str:
    """Why a site is not attached, as `farflung-site status` says it; empty if it is, or nobody answers."""
    try:
        found = ring(Home.at(field.federation.folder(site)), "status")
    except FarflungError:
        return ""
    return str(found["problem"])
