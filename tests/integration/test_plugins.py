"""Plug-ins that misbehave, in a real daemon: stopped, named, and the run goes on without them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.child import program
from orchestrator.views import Plugin, Round
from protos.errors import ConfigInvalid
from tests.support import wayward
from tests.support.field import ORCHESTRATOR, Field

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("plugins"), pytest.mark.timeout(480)]

SECONDS = (
    60.0  # a process with torch took 3 s to start, and more than 20 on a machine with ten others
)
MIB = 1024
DISTILLED = [{"name": "feddf", "steps": 3}]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """A federation whose plug-ins have little time and memory."""
    plugins = {"seconds": SECONDS, "memory_bytes": MIB << 20}
    root = tmp_path_factory.mktemp("field")
    path = [wayward.install(root / "packages"), str(Path(__file__).parents[2])]
    environment = {"PYTHONPATH": os.pathsep.join(path)}
    field = Field(root, daemon={"plugins": plugins}, environment=environment)
    with field.federation:
        yield field


@pytest.fixture
def field(own: Field) -> Iterator[Field]:
    yield own
    own.clear()


def misbehave(field: Field, fault: str) -> None:
    (field.switches[ORCHESTRATOR] / "fault").write_text(fault)


def feddf(round: Round) -> Plugin:
    return next(p for p in round.plugins if p.name == "feddf")


def complete(field: Field, run: str) -> list[Round]:
    view = field.federation.wait(run, 200)
    assert view.state == "finished", view.reason
    rounds = field.federation.rounds(run)
    assert [r.state for r in rounds] == ["committed"] * len(rounds)
    assert not any(r.missing for r in rounds)
    return rounds


def farflung(field: Field, *words: str) -> subprocess.CompletedProcess[str]:
    home = str(field.federation.home.path)
    command = [*program("farflung", "orchestrator.cli"), *words, "--home", home]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "raised ValueError"),
        ("loop", f"ran longer than its {SECONDS:g} s"),
        ("memory", f"needed more than its {MIB} MiB of memory"),
        ("connect ADDRESS", "Network is unreachable"),
        ("read KEY", "FileNotFoundError"),
    ],
)
def test_it_is_stopped_and_named_and_everything_goes_on(
    field: Field, fault: str, words: str
) -> None:
    federation = field.federation
    key = next(p for p in (federation.home.path / "keys").rglob("*") if p.is_file())
    address = federation.client.status().address
    misbehave(field, fault.replace("ADDRESS", address).replace("KEY", str(key)))
    config = field.config(f"bad-{fault.split()[0]}", rounds=2, strategy=DISTILLED)
    run = federation.launch(config)
    spoilt = federation.until(
        lambda e: "feddf was skipped in round 1" in e.text, run, timeout_s=120
    )
    assert spoilt.level == "error"
    field.clear()  # in the second round, or in the next run, it behaves
    rounds = complete(field, run)
    assert feddf(rounds[0]).state == "skipped"
    assert words in feddf(rounds[0]).reason, feddf(rounds[0]).reason
    assert rounds[0].scores["test.accuracy"] > 0
    told = farflung(field, "watch", run)
    assert told.returncode not in (0, 75)  # no site was missing, but something was
    assert words in " ".join((told.stdout + told.stderr).split())

    again = complete(field, federation.launch(field.config("good", rounds=1, strategy=DISTILLED)))
    assert feddf(again[0]).state == "done"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("raise", "raised ValueError: no root in the bracket"),
        ("loop", f"ran longer than its {SECONDS:g} s"),
        ("memory", f"needed more than its {MIB} MiB of memory"),
        ("connect ADDRESS", "Connection refused"),  # on a loopback of its own with Ray
        ("read KEY", "FileNotFoundError"),
    ],
)
def test_a_calibration_is_stopped_and_named_too_where_it_has_no_process_of_its_own(
    field: Field, fault: str, words: str
) -> None:
    federation = field.federation
    key = next(p for p in (federation.home.path / "keys").rglob("*") if p.is_file())
    told = fault.replace("ADDRESS", federation.client.status().address).replace("KEY", str(key))
    strategy = [{"name": "test_wayward", "fault": told}, {"name": "conformal"}]
    config = field.config(f"map-{fault.split()[0]}", rounds=1, strategy=strategy)
    (round,) = complete(field, federation.launch(config))
    plugins = {p.name: p for p in round.plugins}
    assert plugins["test_wayward"].state == "skipped"
    assert words in plugins["test_wayward"].reason
    assert plugins["conformal"].state == "done"
    assert "test_wayward" not in round.calibration
    assert 0 < round.scores["test.coverage"] <= 1
    assert round.scores["test.accuracy"] > 0

    behaved = [{"name": "test_wayward"}]
    config = field.config("map-good", rounds=1, strategy=behaved)
    (round,) = complete(field, federation.launch(config))
    assert round.calibration["test_wayward"]["temperature"] > 0


def test_a_round_is_held_where_the_run_says_so_and_tried_again(field: Field) -> None:
    federation = field.federation
    misbehave(field, "raise")
    gate = {"on_hold": "wait"}
    config = field.config("held", rounds=1, strategy=DISTILLED, on_error="hold", gate=gate)
    run = federation.launch(config)
    view = federation.wait(run, 120)
    assert view.state == "paused"
    assert "feddf was held in round 1" in view.reason
    (round,) = federation.rounds(run)
    assert (round.state, feddf(round).state) == ("held", "held")

    other = complete(field, federation.launch(field.config("queued-behind", rounds=1)))
    assert len(other) == 1  # the queue goes on
    field.clear()
    federation.client.extend(run, 1)
    assert feddf(complete(field, run)[-1]).state == "done"


def test_a_held_round_is_released_or_rejected_without_training_again(field: Field) -> None:
    """Of three updates of different size the largest is more than a ten-thousandth above the middle."""
    federation, gate = field.federation, {"norm": 1.0001, "on_hold": "wait"}
    run = federation.launch(field.config("gated", rounds=3, strategy=[], gate=gate))
    models = []
    for number, decide in ((1, "release"), (2, "reject"), (3, "release")):
        view = federation.wait(run, 120)
        assert view.state == "paused"
        assert view.reason.startswith("waiting for decision")
        assert ("3 rounds in a row" in view.reason) == (number == 3)
        assert f"round {number} is held, site " in view.reason
        assert "the norm of its update is " in view.reason
        (*_, held) = federation.rounds(run)
        assert (held.round, held.state) == (number, "held")
        assert held.scores["val.accuracy"] > 0
        models.append(held.model)
        assert farflung(field, decide, run).returncode == 0
    assert federation.wait(run, 120).state == "finished"
    refused = farflung(field, "release", run)
    assert refused.returncode == 75
    assert "it is finished, and no round of it waits for a decision" in " ".join(
        refused.stderr.split()
    )
    first, second, third = federation.rounds(run)
    assert [r.state for r in (first, second, third)] == ["committed", "abandoned", "committed"]
    assert (first.model, third.model) == (models[0], models[2])
    assert first.model == third.base, "the rejected one is nobody's base"
    assert federation.client.run(run).model == third.model
    told = farflung(field, "watch", run)
    assert told.returncode == 75
    assert "round 2 was rejected: site " in " ".join(told.stderr.split())


def test_the_orchestrators_own_data_judge_too(field: Field) -> None:
    """They are those of the site north, which has the same part of them."""
    config = field.config("judged", rounds=1, assess={"holdout": True})
    (round,) = complete(field, field.federation.launch(config))
    (north,) = (row.scores for row in round.sites if row.site == "north")
    for metric in ("accuracy", "nll", "ece", "brier"):
        assert round.scores[f"holdout.{metric}"] == pytest.approx(north[f"val.{metric}"], abs=1e-9)
        ours = round.scores[f"holdout_test.{metric}"]
        assert ours == pytest.approx(north[f"test.{metric}"], abs=1e-9)

    misbehave(field, "holdout")
    with pytest.raises(ConfigInvalid, match="the labelled images are gone"):
        field.federation.launch(config)
    field.clear()
    run = field.federation.launch(config | {"rounds": 3})
    client = field.federation.client
    field.federation.await_that(lambda: client.run(run).committed > 0, "round 1 committed", 120)
    misbehave(field, "holdout")
    last = complete(field, run)[-1]
    (plugin,) = (p for p in last.plugins if p.name == "holdout")
    assert plugin.state == "skipped"
    assert "the labelled images are gone" in plugin.reason
    assert "val.accuracy" in last.scores
    assert "holdout.accuracy" not in last.scores


def test_what_makes_the_model_worse_than_tolerated_has_no_part_in_it(
    field: Field, tmp_path: Path
) -> None:
    federation = field.federation
    plain = complete(field, federation.launch(field.config("plain", rounds=1)))
    misbehave(field, "spoil")
    stack = [*DISTILLED, {"name": "temperature"}]
    unjudged = complete(
        field, federation.launch(field.config("unjudged", rounds=1, strategy=stack))
    )
    assert feddf(unjudged[0]).state == "done"
    fall = plain[0].scores["val.accuracy"] - unjudged[0].scores["val.accuracy"]
    assert fall > 0.2
    compared = farflung(field, "compare", "plain", "unjudged", "--json")
    document = json.loads(compared.stdout)
    first, second = document["arms"]
    assert first["scores"]["accuracy"]["mean"] == plain[0].scores["test.accuracy"]
    lost = plain[0].scores["test.accuracy"] - unjudged[0].scores["test.accuracy"]
    assert second["against"]["accuracy"]["mean"] == pytest.approx(-lost)
    assert second["differs"]["strategy"] == ["feddf", "temperature"]

    run = federation.launch(field.config("judged", rounds=1, strategy=stack, tolerance=0.1))
    (judged,) = complete(field, run)
    assert feddf(judged).state == "skipped"
    assert f"validation accuracy fell by {100 * fall:.2f} points" in feddf(judged).reason
    assert judged.model == plain[0].model  # to the bit the average
    raw = {k: v for k, v in judged.scores.items() if "calibrated" not in k}
    assert raw == plain[0].scores
    assert judged.scores["val_calibrated.accuracy"] == plain[0].scores["val.accuracy"]
    told = farflung(field, "watch", run)
    assert told.returncode not in (0, 75)
    assert "feddf was skipped: validation accuracy fell" in " ".join(told.stderr.split())

    field.clear()
    run = federation.launch(field.config("tolerated", rounds=1, strategy=stack, tolerance=0.1))
    (tolerated,) = complete(field, run)
    assert feddf(tolerated).state == "done"
    assert tolerated.model != plain[0].model
    assert farflung(field, "watch", run).returncode == 0


def test_of_two_the_one_that_costs_too_much_is_left_out(field: Field) -> None:
    strategy = [{"name": "test_spoiler"}, *DISTILLED]
    config = field.config("two", rounds=1, strategy=strategy, tolerance=0.1)
    (judged,) = complete(field, field.federation.launch(config))
    plugins = {p.name: p for p in judged.plugins}
    assert plugins["test_spoiler"].state == "skipped"
    assert "validation accuracy fell by" in plugins["test_spoiler"].reason
    assert plugins["feddf"].state == "done"
    alone = field.config("alone", rounds=1, strategy=DISTILLED)
    (other,) = complete(field, field.federation.launch(alone))
    assert judged.model == other.model
    assert judged.scores == other.scores


def test_features_of_single_samples_do_not_leave_unless_a_site_says_so(field: Field) -> None:
    strategy = [{"name": "alife", "new": 1}, {"name": "feature_replay", "memory": 4, "steps": 5}]
    run = field.federation.launch(field.config("replayed", rounds=2, strategy=strategy))
    view = field.federation.wait(run, 200)
    assert view.state == "paused"
    assert 'side payload feature_replay/features ("concatenate") may not leave' in view.reason
