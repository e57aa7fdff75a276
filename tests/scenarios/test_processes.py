"""Processes that stop, hang, die or run short: each is named where the operator looks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from protos.faults import Fault
from tests.support.faulty import ORCHESTRATOR
from tests.support.field import SITES, Field
from tests.support.reading import farflung
from tests.support.rigged import RiggedFederation, needs_mounts, with_mounts
from tests.support.scene import complete, configured, ended, restored, without
from tests.support.sites import ask

pytestmark = [pytest.mark.xdist_group("processes"), pytest.mark.timeout(240)]

STEPS = 2 * 120 // 20
"""Of a site in a round."""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    field = Field(tmp_path_factory.mktemp("field"), kind=RiggedFederation)
    with field.federation:
        yield field


@pytest.fixture
def field(own: Field) -> Iterator[Field]:
    yield own
    restored(own)


def held_at(field: Field, site: str, name: str, **changes: object) -> str:
    """A run whose round 1 waits for a site in the middle of its training."""
    (field.switches[site] / "gate").touch()
    run = field.federation.launch(field.config(name, rounds=1, **changes))
    field.federation.await_that((field.switches[site] / "reached").exists, "training", 60)
    return run


def two_counted(field: Field, run: str) -> bool:
    rounds = field.federation.rounds(run)
    return bool(rounds) and sum(row.state == "counted" for row in rounds[0].sites) == 2


# -- stopped, slow, hanging ---------------------------------------------------------------------------


def test_a_slow_site_is_shown_training_and_waited_for(field: Field) -> None:
    """F1: two fast sites of three suffice, and the slow one is not taken for dead."""
    run = held_at(field, "east", "slow")
    field.federation.await_that(lambda: two_counted(field, run), "the others counted", 60)
    grace = field.federation.home.config.sites.grace_s
    with pytest.raises(TimeoutError):
        field.federation.await_that(
            lambda: field.federation.client.run(run).state != "running", "its end", 2 * grace
        )
    row = next(r for r in field.federation.rounds(run)[0].sites if r.site == "east")
    assert row.state == "training"
    (field.switches["east"] / "gate").unlink()
    complete(field, run)


def test_a_stopped_trainer_is_missed_with_how_far_it_was(field: Field) -> None:
    run = held_at(field, "east", "trainer-stopped", cohort={"quorum": 2, "deadline_s": 6})
    field.federation.stop("east", process="trainer")
    without(field, run, "east", "did not answer in time: training", "no progress for")


def test_a_trainer_that_hangs_is_missed_and_replaced(field: Field) -> None:
    (field.switches["east"] / "fault").write_text("loop")
    cohort = {"quorum": 2, "deadline_s": 6}
    run = field.federation.launch(field.config("hangs", rounds=1, cohort=cohort))
    without(field, run, "east", "did not answer in time: training", "no progress for")
    field.clear()
    complete(field, field.federation.launch(field.config("after-hang", rounds=1)))


def test_a_stopped_agent_is_gone_and_comes_back_with_its_work(field: Field) -> None:
    run = held_at(field, "east", "agent-stopped", cohort={"quorum": "all", "deadline_s": 120})
    field.federation.await_that(lambda: two_counted(field, run), "the others counted", 60)
    field.federation.stop("east")
    field.federation.until(lambda e: e.text == "site east is gone", timeout_s=30)
    assert {s.name: s.state for s in field.federation.client.sites()}["east"] == "gone"
    (field.switches["east"] / "gate").unlink()
    field.federation.resume("east")
    complete(field, run)
    assert field.steps("east") == STEPS


def test_a_stopped_daemon_goes_on_and_no_work_is_lost(field: Field) -> None:
    run = held_at(field, "east", "daemon-stopped", cohort={"quorum": "all", "deadline_s": 120})
    field.federation.await_that(lambda: two_counted(field, run), "the others counted", 60)
    field.federation.stop(ORCHESTRATOR, process="daemon")
    (field.switches["east"] / "gate").unlink()

    def waits() -> bool:
        return bool(ask(field.federation.folder("east"), "status")["waiting"])

    field.federation.await_that(waits, "a contribution that waits at the site", 30)
    field.federation.resume(ORCHESTRATOR)
    complete(field, run)
    assert {site: field.steps(site) for site in SITES} == dict.fromkeys(SITES, STEPS)


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_ray_that_dies_in_a_round_costs_no_work(field: Field, victim: str) -> None:
    """Its node or its head, killed between the close of a round and its reduction."""
    federation = field.federation
    federation.fail(ORCHESTRATOR, Fault("reduce.begun", do="delay", process="daemon", seconds=1.0))
    run = federation.launch(field.config(f"no-{victim}", rounds=2, cohort={"quorum": "all"}))
    federation.await_fault(ORCHESTRATOR)
    (ray,) = [p for p in federation.family(ORCHESTRATOR) if p.name() == victim]
    ray.kill()
    complete(field, run)
    assert {site: field.steps(site) for site in SITES} == dict.fromkeys(SITES, 2 * STEPS)
    told = [e.text for e in federation.client.watch(follow=False)]
    assert any(text.startswith("compute: died") for text in told)


# -- what a task does -----------------------------------------------------------------------------------


def test_an_error_in_the_second_round_keeps_the_first(field: Field) -> None:
    (field.switches["north"] / "gate").touch()
    run = field.federation.launch(field.config("second", rounds=2, cohort={"quorum": "all"}))
    (field.switches["north"] / "gate").unlink()
    field.federation.until(lambda e: "round 1 of 2 is committed" in e.text, run)
    (field.switches["north"] / "fault").write_text("raise")
    view, rounds, told = ended(field, run, "paused")
    words = "north: site north: the task failed: ValueError at blobs.py:"
    assert words in view.reason
    assert words in told.text
    assert rounds[0].state == "committed"
    field.clear()
    field.federation.client.extend(run, 2)
    assert field.federation.wait(run, 60).state == "finished"
    assert farflung(field.federation, "verify", run).code == 0


def test_missing_data_are_named_by_class_and_place_and_not_by_path(field: Field) -> None:
    (field.switches["south"] / "fault").write_text("no data")
    run = field.federation.launch(field.config("no-data", rounds=1))
    words = "site south: the task failed: FileNotFoundError: No such file or directory at blobs.py:"
    rounds = without(field, run, "south", words)
    assert "4711" not in rounds[0].missing["south"]


def test_a_task_that_can_not_be_imported_is_named_at_its_site(field: Field) -> None:
    federation = field.federation
    task = federation.root / "broken.py"
    task.write_text("from farflung import Task\nimport a_package_that_is_not_there\n")
    source = federation.sites["east"]["tasks"]["blobs"]["source"]
    with configured(field, "east", lambda text: text.replace(source, f"{task}:Blobs")):
        run = federation.launch(field.config("bad-import", rounds=1))
        without(field, run, "east", "site east", "ModuleNotFoundError")


def test_a_task_that_is_not_at_the_orchestrator_is_refused_at_launch(field: Field) -> None:
    file = field.federation.root / "run.toml"
    file.write_text('name = "strange"\nrounds = 1\n[task]\nname = "mammograms"\n')
    told = farflung(field.federation, "launch", str(file))
    assert told.code == 78
    assert "mammograms" in told.text


def test_an_unknown_key_of_the_run_file_is_named(field: Field) -> None:
    file = field.federation.root / "run.toml"
    file.write_text('name = "slip"\nrounds = 1\nrouns = 1\n[task]\nname = "blobs"\n')
    told = farflung(field.federation, "launch", str(file))
    assert told.code == 78
    assert "rouns" in told.text


# -- devices and memory ---------------------------------------------------------------------------------


def test_a_device_that_fails_is_named_and_the_next_plan_gets_a_new_trainer(field: Field) -> None:
    """What torch raises when a card falls off the bus; in that process nothing works on it any more."""
    home = field.federation.folder("east")
    before = ask(home, "status")["trainer_pid"]
    (field.switches["east"] / "fault").write_text("device")
    run = field.federation.launch(field.config("device", rounds=1, assess={"every": 0}))
    without(field, run, "east", "site east: the device failed (AcceleratorError at blobs.py:")
    field.clear()
    complete(field, field.federation.launch(field.config("new-device", rounds=1)))
    assert ask(home, "status")["trainer_pid"] != before


def test_a_device_that_is_not_there_any_more_is_no_reason_to_train_on_another(field: Field) -> None:
    """F2: where site.toml says cuda, and the container lost it."""
    with configured(field, "east", lambda text: text + '\n[site]\ndevice = "cuda"\n'):
        run = field.federation.launch(field.config("no-cuda", rounds=1))
        without(field, run, "east", "the trainer can't begin", "sees no CUDA device")


@needs_mounts
def test_too_little_shared_memory_is_named(field: Field) -> None:
    """F7: the loaders' processes hand their batches on in /dev/shm."""
    federation = field.federation
    assert isinstance(federation, RiggedFederation)
    config = federation.folder("east") / "site.toml"
    before = config.read_text()
    federation.stop_site("east")
    config.write_text(before.replace("[trainer]", "[trainer]\nloader_workers = 1"))
    federation.before["east"] = with_mounts("mount -t tmpfs -o size=4k tmpfs /dev/shm")
    one_by_one = {"name": "blobs", "params": {"one_by_one": True}}
    try:
        federation.start_site("east")
        run = federation.launch(field.config("shm", rounds=1, task=one_by_one))
        without(field, run, "east", "ran out of shared memory", "--shm-size")
    finally:
        federation.before.clear()
        federation.stop_site("east")
        config.write_text(before)
        federation.start_site("east")
