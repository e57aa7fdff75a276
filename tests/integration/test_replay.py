"""Rounds of a real federation, computed again: the same bits, or a name for what is not the same."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.child import program
from orchestrator.verifying import verify_file
from orchestrator.views import Round
from protos.errors import DataCorrupt, InvalidInput, NotFound
from protos.faults import Fault
from tests.support.field import SITES, Field

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(240)]

STRATEGY: list[dict[str, Any]] = [
    {"name": "co_learning"},
    {"name": "int8"},
    {"name": "feddf", "steps": 8},
    {"name": "temperature"},
]

CALIBRATED = {"name": "temperature", "certainty": 0.0}
"""So that there is a map in any case."""


@pytest.fixture(scope="module")
def keeping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """A federation that keeps every contribution."""
    field = Field(
        tmp_path_factory.mktemp("keeping"), daemon={"retention": {"contributions": "all"}}
    )
    with field.federation:
        yield field


@pytest.fixture
def field(keeping: Field) -> Iterator[Field]:
    yield keeping
    keeping.clear()
    for site in SITES:
        if not keeping.federation.agents()[site].alive:
            keeping.federation.start_site(site, wait=False)
    keeping.federation.await_sites(SITES)


def finished(field: Field, run: str, rounds: int) -> list[Round]:
    view = field.federation.wait(run, 400)
    assert view.state == "finished", view.reason
    found = field.federation.rounds(run)
    assert len(found) == rounds
    return found


def said(field: Field, *words: str, expected: int = 0) -> str:
    """What a command prints."""
    command = [*program("farflung", "orchestrator.cli"), *words]
    home = ["--home", str(field.federation.home.path)]
    done = subprocess.run([*command, *home], capture_output=True, text=True)
    assert done.returncode == expected, (done.stdout, done.stderr)
    return " ".join((done.stdout + done.stderr).split())


def test_the_newest_round_is_computed_again_and_checked_elsewhere(
    real: Field, tmp_path: Path
) -> None:
    """With what retention keeps by default."""
    client = real.federation.client
    # A seed of its own: what another run of this federation keeps too is not given up here.
    config = real.config("newest", seed=2311, strategy=[{"name": "int8"}, {"name": "temperature"}])
    run = real.federation.launch(config)
    rounds = finished(real, run, 2)
    done = client.replay(run, 2)
    assert done.identical, done
    what = {one.what: one.computed for one in done.compared}
    assert what["model"] == rounds[1].model
    assert {"scores", "calibration maps"} <= what.keys()
    with pytest.raises(NotFound, match="contributions of east, north, south are not in the store"):
        client.replay(run, 1)
    found = client.verify(run)
    assert found.problems == ()
    assert [one.round for one in found.erased] == [1]
    client.export(run, "", tmp_path, ledger=True)
    offline = verify_file(tmp_path, real.federation.home.keys / "ca.pem")
    assert (offline.problems, offline.digest) == ((), found.digest)


@pytest.mark.slow
def test_sums_that_were_not_used_are_not_used_again(real: Field) -> None:
    """A site's disk is full when it is asked what the calibrated outputs are worth: too few answer."""
    federation = real.federation
    # What it writes is its training, the sums of the model, and then those of calibrated outputs.
    federation.fail("north", Fault("outbox.head.written", hit=3, do="raise", process="link"))
    cohort = {"quorum": "all", "deadline_s": 60}
    config = real.config("unused", rounds=1, seed=2312, cohort=cohort, strategy=[CALIBRATED])
    run = federation.launch(config)
    (round,) = finished(real, run, 1)
    assert "No space left on device" in round.unassessed["north"]
    assert "test.nll" in round.scores
    assert not any(name.startswith("test_calibrated") for name in round.scores)
    done = federation.client.replay(run, 1)
    assert done.identical, done


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rounds_are_computed_again_verified_and_taken_back(field: Field, tmp_path: Path) -> None:
    """Compression, distillation, calibration, momentum, and a straggler who is missing in round 2."""
    federation, client = field.federation, field.federation.client
    run = federation.launch(field.config("again", rounds=1, strategy=STRATEGY))
    finished(field, run, 1)
    federation.kill("east")
    client.extend(run, 2)
    rounds = finished(field, run, 2)
    federation.start_site("east")
    client.extend(run, 3)
    rounds = finished(field, run, 3)
    assert [sorted(r.missing) for r in rounds] == [[], ["east"], []]

    before = sorted(path.name for path in federation.home.store.rglob("*"))
    for round in rounds:
        done = client.replay(run, round.round)
        assert done.identical, done
        what = {one.what: one.computed for one in done.compared}
        assert what["model"] == round.model
        assert {"memos", "scores", "calibration maps"} <= what.keys()
        assert len(done.sites) == 3 - len(round.missing)
    # Nothing of it stays, in the store or beside it.
    assert sorted(path.name for path in federation.home.store.rglob("*")) == before
    assert "Everything is the same" in said(field, "replay", run, "2")
    with pytest.raises(NotFound, match="no committed round 9; committed are rounds 1 to 3"):
        client.replay(run, 9)
    with pytest.raises(InvalidInput, match="round 0 is the first base"):
        client.replay(run, 0)

    assert "nothing is wrong" in said(field, "verify", run)
    out = tmp_path / "ledger"
    said(field, "export", run, str(out), "--ledger")
    assert [path.name for path in out.iterdir()] == ["ledger.jsonl"]
    offline = json.loads(said(field, "verify", str(out), "--json"))
    assert offline["problems"] == []
    assert offline["digest"] == client.verify(run).digest
    lines = (out / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (out / "ledger.jsonl").write_bytes(b"".join([*lines[:5], *lines[6:]]))
    assert "before it entry 5 is missing" in said(field, "verify", str(out), expected=74)

    # Back to round 1, whose states the sites have still: round 2 with east this time.
    assert "goes on from round 1 of 3" in said(field, "rollback", run, "1")
    again = finished(field, run, 3)
    assert [(r.attempt, sorted(r.missing)) for r in again] == [(1, []), (2, []), (2, [])]
    assert again[1].base == rounds[0].model
    assert again[1].model != rounds[1].model
    assert client.verify(run).problems == ()
    assert all(client.replay(run, n).identical for n in (1, 2, 3))
    straight = federation.launch(field.config("straight", rounds=3, strategy=STRATEGY))
    assert [r.model for r in finished(field, straight, 3)] == [r.model for r in again]


@pytest.mark.slow
def test_what_is_damaged_or_gone_is_named(field: Field) -> None:
    federation, client = field.federation, field.federation.client
    run = federation.launch(field.config("damaged", rounds=1))
    finished(field, run, 1)
    sent = said(field, "export", run, str(federation.root / "x"), "--ledger") and [
        json.loads(json.loads(line)["header"])
        for line in (federation.root / "x" / "ledger.jsonl").read_text().splitlines()
        if '"kind":"accepted"' in line
    ]
    south = next(h["index"] for h in sent if h["site"] == "south" and h["kind"] == "train")
    path = federation.home.store / "artefacts" / south[:2] / f"{south}.data"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        DataCorrupt, match=r"what site south sent is damaged in tensors .*first\.weight"
    ):
        client.replay(run, 1)
    problems = client.verify(run).problems
    assert [one.site for one in problems] == ["south"]
    assert "round 1: contribution of site south: artefact" in problems[0].text
    path.unlink()
    with pytest.raises(NotFound, match="the contributions of south are not in the store any more"):
        client.replay(run, 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_twenty_rounds_with_stragglers_and_drop_outs(field: Field) -> None:
    federation, client = field.federation, field.federation.client
    changes: dict[str, Any] = {
        "cohort": {"quorum": 2, "deadline_s": 8, "partial": True},
        "local": {"work": {"epochs": 2}, "batch_size": 5, "lr": 0.1},
    }
    run = federation.launch(field.config("twenty", rounds=1, strategy=STRATEGY, **changes))
    finished(field, run, 1)
    slow = {4: "north", 12: "south", 20: "north"}
    for number in range(2, 21):
        gone = SITES[number % 3] if number % 4 == 2 else ""
        if gone:
            federation.kill(gone)
        if number in slow:
            (field.switches[slow[number]] / "slow").write_text("0.25")  # 12 s of work
        client.extend(run, number)
        finished(field, run, number)
        field.clear()
        if gone:
            federation.start_site(gone)
    rounds = federation.rounds(run)
    assert sum(bool(r.missing) for r in rounds) == 5
    cut_short = {r.round: {s.site for s in r.sites if s.partial} for r in rounds}
    assert all(site in cut_short[number] for number, site in slow.items())
    for round in rounds:
        done = client.replay(run, round.round)
        assert done.identical, done
    assert client.verify(run).problems == ()
