"""Rounds of a real federation: processes, mutual TLS, Ray, and what goes wrong in the field."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.child import program
from orchestrator.views import Event, Round, Run
from protos.errors import ConfigInvalid
from protos.plan import StrategyChoice
from strategies.calibration.conformal import Conformal
from strategies.stack import Stack
from tests.support.blobs import Blobs
from tests.support.field import ORCHESTRATOR, SITES, Field
from tests.support.files import wait_for

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(240)]


@pytest.fixture
def field(real: Field) -> Iterator[Field]:
    yield real
    real.clear()
    real.federation.await_sites(SITES)


def site_row(round: Round, site: str) -> Any:
    return next(row for row in round.sites if row.site == site)


def finished(field: Field, run: str) -> tuple[Run, list[Round]]:
    view = field.federation.wait(run, 180)
    assert view.state == "finished", view.reason
    return view, field.federation.rounds(run)


def told(field: Field, run: str, words: str) -> Event:
    return field.federation.until(lambda e: words in e.text, run, timeout_s=60)


def two_counted(event: Event) -> bool:
    rows = event.data.get("sites", ()) if event.kind == "round" else ()
    return sum(row["state"] == "counted" for row in rows) == 2


# -- the main job -----------------------------------------------------------------------------------


def test_a_run_learns_and_its_export_scores_what_the_ledger_says(
    field: Field, tmp_path: Path
) -> None:
    client = field.federation.client
    plugins = ["co_learning", "self_distillation", "feddf", "student", "temperature", "conformal"]
    strategy = [{"name": n} for n in plugins]
    strategy[2]["steps"] = 10  # type: ignore[assignment]
    strategy[3] |= {"steps": 40, "learning_rate": 0.03}  # type: ignore[dict-item]
    run = field.federation.launch(field.config("learns", rounds=3, strategy=strategy))
    view, rounds = finished(field, run)

    assert [r.state for r in rounds] == ["committed"] * 3
    assert all(r.assessed and not r.missing for r in rounds)
    assert rounds[-1].scores["test.accuracy"] > 0.7
    assert rounds[-1].scores["test.nll"] < rounds[0].scores["test.nll"]
    for round in rounds:
        states = {p.name: p.state for p in round.plugins}
        assert states["feddf"] == states["temperature"] == "done", round.plugins
        assert round.scores["test_calibrated.accuracy"] == round.scores["test.accuracy"]
        assert {"test", "test_calibrated"} <= round.reliability.keys()
        assert all(0 < row.scores["test.coverage"] <= 1 for row in round.sites)
        assert {row.state for row in round.sites} == {"counted"}
        assert round.wire_bytes > 0

    client.export(run, "", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    task = Blobs()
    model = task.model()
    model.load_state_dict(tensors)
    model.eval()
    inputs, targets = task.test_data().tensors
    with torch.no_grad():
        outputs = model(inputs)
    nll = torch.nn.functional.cross_entropy(outputs.double(), targets).item()
    assert nll == pytest.approx(rounds[-1].scores["test.nll"], rel=1e-6)
    assert (outputs.argmax(1) == targets).double().mean().item() == pytest.approx(
        rounds[-1].scores["test.accuracy"]
    )

    # The maps that came with it do to its outputs what they did in the round.
    maps = json.loads((tmp_path / "out" / "calibration.json").read_text())["maps"]
    assert maps == rounds[-1].calibration
    stack = Stack([StrategyChoice(name=name) for name in maps])
    calibrated = stack.transform(outputs, maps)
    nll = torch.nn.functional.cross_entropy(calibrated, targets).item()
    assert nll == pytest.approx(rounds[-1].scores["test_calibrated.nll"], rel=1e-6)
    sets = Conformal().sets(calibrated, maps["conformal"])
    covered = sets.gather(1, targets[:, None]).double().mean().item()
    assert covered == pytest.approx(rounds[-1].scores["test.coverage"])

    client.export(run, "", tmp_path / "small", of="student")
    student = task.student()
    student.load_state_dict(load_file(tmp_path / "small" / "student.safetensors"))
    with torch.no_grad():
        own = (student(inputs).argmax(1) == targets).double().mean().item()
    reports = [next(p for p in r.plugins if p.name == "student").report for r in rounds]
    assert own == pytest.approx(reports[-1]["accuracy"])
    assert own > 0.5
    assert all(p.cpu_seconds for r in rounds for p in r.plugins if p.name in ("feddf", "student"))

    again = field.federation.launch(
        field.config("goes-on", rounds=1), start_from=f"{view.name}@best"
    )
    _, later = finished(field, again)
    best = next(r for r in rounds if r.round == client.run(run).best)
    assert later[0].base == best.model


@pytest.mark.slow
def test_an_export_is_what_is_deployed_with_the_map_that_was_fitted_to_it(
    field: Field, tmp_path: Path
) -> None:
    client = field.federation.client
    strategy = [
        {"name": "one", "tail": "second"},
        {"name": "clsa", "levels": ["first"]},
        {"name": "seed", "queue": 16, "weight": 0.5},
        {"name": "temperature"},
    ]
    run = field.federation.launch(field.config("deployed", rounds=1, strategy=strategy))
    _, (round,) = finished(field, run)

    client.export(run, "", tmp_path / "out")
    task = Blobs()
    model = task.model()
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))  # strict: nothing else
    inputs, targets = task.test_data().tensors
    with torch.no_grad():
        outputs = model.eval()(inputs)
    nll = torch.nn.functional.cross_entropy(outputs.double(), targets).item()
    assert nll == pytest.approx(round.scores["test.nll"], rel=1e-6)
    maps = json.loads((tmp_path / "out" / "calibration.json").read_text())["maps"]
    calibrated = Stack([StrategyChoice(name=name) for name in maps]).transform(outputs, maps)
    nll = torch.nn.functional.cross_entropy(calibrated, targets).item()
    assert nll == pytest.approx(round.scores["test_calibrated.nll"], rel=1e-6)
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "`one`, `clsa`, `seed` took the others away" in card

    client.export(run, "", tmp_path / "stored", stored=True)
    stored = load_file(tmp_path / "stored" / "model.safetensors")
    assert any("native_branches.2" in name for name in stored)
    assert any("seed_teacher" in name for name in stored)


def test_the_same_run_twice_gives_the_same_bits(field: Field) -> None:
    first = field.federation.launch(field.config("bits", seed=7))
    second = field.federation.launch(field.config("bits", seed=7))
    other = field.federation.launch(field.config("bits", seed=8))
    models = [finished(field, run)[1][-1].model for run in (first, second, other)]
    assert models[0] == models[1] != models[2]


def test_frozen_tensors_stay_and_one_site_may_give_the_first_base(field: Field) -> None:
    config = field.config("frozen", rounds=1, init={"from": "site:north"}, assess={"every": 0})
    run = field.federation.launch(config)
    _, rounds = finished(field, run)
    shared = 8 * 12 + 12 + 12 * 3 + 3  # parameters of the two trained layers
    for row in rounds[0].sites:
        assert 0 < row.sent_bytes < 4 * shared + 64
        assert row.received_bytes < 4 * shared + 64 * 6


def test_a_plug_in_that_fails_is_skipped_by_name_and_the_round_is_committed(field: Field) -> None:
    fault, gate = field.switches[ORCHESTRATOR] / "fault", field.switches["north"] / "gate"
    config = field.config("skipped", rounds=1, strategy=[{"name": "feddf"}])
    fault.write_text("proxy")
    with pytest.raises(ConfigInvalid, match=r"task blobs: .*the proxy images are gone"):
        field.federation.launch(config)
    fault.unlink()
    gate.touch()  # at launch they are there, when the round is refined they are not
    run = field.federation.launch(config)
    fault.write_text("proxy")
    gate.unlink()
    _, rounds = finished(field, run)
    plugin = next(p for p in rounds[0].plugins if p.name == "feddf")
    assert plugin.state == "skipped"
    assert "the proxy images are gone" in plugin.reason
    assert rounds[0].state == "committed"
    assert rounds[0].scores["test.accuracy"] > 0
    told(field, run, "feddf was skipped in round 1")


# -- what goes wrong at a site ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "words"),
    [("segfault", "SIGSEGV"), ("kill", "SIGKILL"), ("memory", "memory"), ("raise", "ValueError")],
)
def test_a_trainer_that_dies_is_named_and_its_site_stays(
    field: Field, fault: str, words: str
) -> None:
    (field.switches["north"] / "fault").write_text(fault)
    run = field.federation.launch(field.config(f"dies-{fault}", rounds=1))
    _, rounds = finished(field, run)
    row = site_row(rounds[0], "north")
    assert row.state == "failed"
    assert words in row.reason, row.reason
    assert "4711" not in row.reason  # a message of the task may hold data
    assert words in rounds[0].missing["north"]
    told(field, run, words)
    states = {s.name: s.state for s in field.federation.client.sites()}
    assert states["north"] == "attached"


def test_nan_is_refused_with_site_and_tensor_and_the_model_is_unharmed(
    field: Field, tmp_path: Path
) -> None:
    (field.switches["south"] / "fault").write_text("nan")
    run = field.federation.launch(field.config("nan", rounds=1))
    _, rounds = finished(field, run)
    row = site_row(rounds[0], "south")
    assert (row.state, row.error) == ("refused", "ContributionRefused")
    assert "site south, tensor unseen" in row.reason
    assert rounds[0].missing["south"] == row.reason
    assert {s.site for s in rounds[0].sites if s.state == "counted"} == {"north", "east"}
    assert rounds[0].scores["test.nll"] > 0
    told(field, run, "site south, tensor unseen")
    home = str(field.federation.home.path)
    words = [*program("farflung", "orchestrator.cli"), "watch", run, "--home", home]
    watched = subprocess.run(words, capture_output=True, text=True, check=False)
    assert watched.returncode == 75  # a round without a site is no success
    assert "site south, tensor unseen" in watched.stdout + watched.stderr
    page = f"{field.federation.client.status().dashboard}api/runs/{run}/rounds"
    with urllib.request.urlopen(page) as answer:
        assert "site south, tensor unseen" in answer.read().decode()
    field.federation.client.export(run, "", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())


def test_another_shape_is_refused_by_name(field: Field) -> None:
    federation = field.federation
    folder = federation.folder("east") / "site.toml"
    before = folder.read_text()
    tables = federation.sites["east"]
    settings = tables["tasks"]["blobs"]["settings"]
    federation.stop_site("east")
    try:
        settings["hidden"] = 20
        federation.enroll(["east"])
        federation.start_site("east")
        run = federation.launch(field.config("shape", rounds=1))
        _, rounds = finished(field, run)
        assert "first.weight" in rounds[0].missing["east"]
        assert site_row(rounds[0], "east").state in ("failed", "refused")
    finally:
        settings["hidden"] = 0
        federation.stop_site("east")
        folder.write_text(before)
        federation.start_site("east")


# -- processes that die -------------------------------------------------------------------------------


def test_a_killed_site_is_missing_and_comes_back(field: Field) -> None:
    gate = field.switches["north"] / "gate"
    gate.touch()
    run = field.federation.launch(field.config("site-killed", rounds=2))
    wait_for(field.switches["north"] / "reached", 60)
    field.federation.kill("north")
    event = field.federation.until(
        lambda e: e.kind == "round" and e.round == 1 and e.data["state"] == "committed", run
    )
    assert "gone" in event.data["missing"]["north"]
    gate.unlink()
    held = field.switches["south"] / "gate"  # so that round 2 is still open when north is back
    held.touch()
    field.federation.start_site("north")
    held.unlink()
    _, rounds = finished(field, run)
    assert "north" in rounds[0].missing
    third = field.federation.launch(field.config("site-back", rounds=1))
    assert not finished(field, third)[1][0].missing


def test_a_killed_daemon_goes_on_and_nothing_is_trained_twice(field: Field) -> None:
    config = field.config("daemon-killed", rounds=2, cohort={"quorum": "all", "deadline_s": 120})
    undisturbed = finished(field, field.federation.launch({**config, "name": "undisturbed"}))[1]
    field.clear()
    gate = field.switches["north"] / "gate"
    gate.touch()
    run = field.federation.launch(config)
    wait_for(field.switches["north"] / "reached", 60)
    field.federation.until(two_counted, run)
    field.federation.kill_daemon()
    field.federation.start_daemon()
    field.federation.await_sites(SITES)
    gate.unlink()
    _, rounds = finished(field, run)
    assert [r.model for r in rounds] == [r.model for r in undisturbed]
    assert all(r.attempt == 1 for r in rounds)
    per_round = 2 * 120 // 20
    assert {site: field.steps(site) for site in SITES} == dict.fromkeys(SITES, 2 * per_round)


@pytest.mark.slow
def test_work_under_way_is_not_begun_again_for_the_next_attempt(field: Field) -> None:
    gate, fault = field.switches["south"] / "gate", field.switches["north"] / "fault"
    gate.touch()
    fault.write_text("raise")
    cohort = {"quorum": "all", "deadline_s": 120, "attempts": 5}
    run = field.federation.launch(field.config("shared-work", rounds=1, cohort=cohort))
    wait_for(field.switches["south"] / "reached", 60)
    told(field, run, "attempt given up")
    fault.unlink()

    def trains_for_the_next(event: Event) -> bool:
        sites = {s["site"]: s for s in event.data.get("sites", ())} if event.kind == "round" else {}
        return event.data.get("attempt", 0) > 1 and sites["south"]["state"] == "training"

    field.federation.until(trains_for_the_next, run)
    gate.unlink()
    _, rounds = finished(field, run)
    assert not rounds[0].missing
    # Whatever else it had been asked would be done before the next run's work.
    finished(field, field.federation.launch(field.config("afterwards", rounds=1, cohort=cohort)))
    assert field.steps("south") == 2 * 2 * 120 // 20


def test_finished_work_of_an_abandoned_attempt_counts_in_the_next(field: Field) -> None:
    gate = field.switches["north"] / "gate"
    gate.touch()
    config = field.config("abandoned", rounds=1, cohort={"quorum": "all", "deadline_s": 4})
    run = field.federation.launch(config)
    told(field, run, "was not there at the deadline")
    gate.unlink()
    _, rounds = finished(field, run)
    assert rounds[0].attempt > 1
    assert not rounds[0].missing
    per_round = 2 * 120 // 20
    assert field.steps("south") == field.steps("east") == per_round


@pytest.mark.slow
def test_it_counts_too_if_the_daemon_is_killed_between_the_attempts(field: Field) -> None:
    gate = field.switches["north"] / "gate"
    gate.touch()
    config = field.config("between", rounds=1, cohort={"quorum": "all", "deadline_s": 25})
    run = field.federation.launch(config)
    field.federation.until(two_counted, run)
    field.federation.kill("orchestrator", at="round.planned")
    field.federation.await_fault("orchestrator")
    gate.unlink()
    field.federation.revive()
    field.federation.await_sites(SITES)
    _, rounds = finished(field, run)
    assert rounds[0].attempt > 1
    per_round = 2 * 120 // 20
    assert field.steps("south") == field.steps("east") == per_round


@pytest.mark.parametrize("away", [False, True])
def test_a_run_that_is_stopped_frees_its_sites_at_once(field: Field, away: bool) -> None:
    federation, gate = field.federation, field.switches["south"] / "gate"
    gate.touch()
    federation.forget_traces()
    run = federation.launch(field.config(f"stopped-{away}", rounds=1))
    wait_for(field.switches["south"] / "reached", 60)
    if away:
        federation.stop("south", "link")
        states = lambda: {site.name: site.state for site in federation.client.sites()}  # noqa: E731
        federation.await_that(lambda: states()["south"] != "attached", "south is gone", 60)
    federation.client.stop(run, now=True)
    federation.await_that(lambda: federation.state(run)[0] == "stopped", "stopped", 60)
    federation.resume("south")
    assert field.steps("south") == 1
    heard = ("trainer", "cancel.heard")
    federation.await_that(lambda: heard in federation.trace("south"), "its work cancelled", 60)
    gate.unlink()
    finished(field, federation.launch(field.config(f"after-{away}", rounds=1)))
    assert field.steps("south") == 1 + 2 * 120 // 20


def test_no_process_is_left(tmp_path: Path) -> None:
    field = Field(tmp_path / "f")
    with field.federation:
        processes = field.federation.processes()
        assert len(processes) > 3
    assert not [p for p in processes if p.is_running() and p.status() != "zombie"]
