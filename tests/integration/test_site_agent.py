"""A real agent (link and trainer as processes) against the wire, over mutual TLS."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from protos.faults import DONE, FOLDER, Fault
from protos.identity import fingerprint, load_certificate, verify_header
from protos.manifest import Manifest
from protos.plan import Plan, Work
from protos.tensors import map_file
from protos.v1 import common_pb2, site_pb2
from tests.support.files import wait_for
from tests.support.sites import (
    RunningAgent,
    ask,
    base_of,
    plan_of,
    site_command,
    unpack,
    workload_of,
    write_config,
)
from tests.support.tiny_orchestrator import TinyOrchestrator

pytestmark = pytest.mark.timeout(180)

TASKS = ("Clouds", "Frozen", "Unlike", "Personal")
MORE = """
[policy]
max_epochs = 50
strategies = ["co_learning", "fedprox"]
[trainer]
threads = 1
memory_bytes = 4_000_000_000
"""


class Site:
    """A joined site and the orchestrator that it dials."""

    def __init__(self, folder: Path) -> None:
        self.orchestrator = TinyOrchestrator(folder / "orchestrator")
        self.orchestrator.start()
        self.home = folder / "north"
        write_config(self.home, TASKS, MORE)
        self.token = self.orchestrator.invite("north")
        self.joined = ask(self.home, "join", self.token)
        self.faults = folder / "faults"
        self.agent = RunningAgent(self.home, **{FOLDER: str(self.faults)})
        self.orchestrator.attached()
        self._plans = 0

    def plan(self, **changes: object) -> Plan:
        """A plan of its own, whose base is there to be fetched."""
        self._plans += 1
        plan = plan_of(run=f"r{self._plans}", **changes)
        if plan.kind == "init":
            return plan
        base = base_of(self.orchestrator.folder, plan)
        update = {"base": self.orchestrator.publish(*base), "manifest": base[1].digest}
        return plan.model_copy(update=update)

    def is_training(self, plan: Plan) -> bool:
        return any(
            m.progress.plan_id == plan.id and m.progress.state == site_pb2.Progress.TRAINING
            for m in self.orchestrator.said
        )

    def close(self) -> None:
        self.agent.stop()
        self.orchestrator.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    yield site
    site.close()


def shared(plan: Plan) -> Manifest:
    return workload_of(plan).shared


# -- a round ---------------------------------------------------------------------------------------


def test_a_whole_round(site: Site) -> None:
    plan = site.plan(work=Work(epochs=2))
    site.orchestrator.offer(plan)
    header, signature, _, payload = site.orchestrator.contribution(plan)

    assert (header.plan_id, header.work_digest) == (plan.id, plan.work_digest)
    assert (header.examples, header.steps, header.epochs) == (40, 10, 2.0)
    assert header.manifest == plan.manifest
    assert {"torch", "cpu", "farflung"} <= set(header.packages)
    assert header.metrics["train_loss"] < header.metrics["train_loss_first"]
    certificate = load_certificate((site.home / "keys/cert.pem").read_bytes())
    assert verify_header(certificate, signature, header.encode(), plan.id, "north")

    manifest = shared(plan)
    update = unpack(header, manifest, payload)
    base = map_file(site.orchestrator.models[plan.base][0], manifest)
    assert set(update) == {t.name for t in manifest}
    assert float(update["0.weight"].norm()) > 0
    assert update["1.num_batches_tracked"] == base["1.num_batches_tracked"] + 10
    states = {m.progress.state for m in site.orchestrator.said if m.progress.plan_id == plan.id}
    assert site_pb2.Progress.PREPARING in states


def test_a_plan_that_is_to_finish_is_contributed_with_what_is_done(site: Site) -> None:
    plan = site.plan(params={"trouble": "slow"}, work=Work(steps=300))  # a minute of it
    site.orchestrator.offer(plan)
    site.orchestrator.until(lambda: site.is_training(plan), "training")
    site.orchestrator.push(finish=site_pb2.Finish(plan_id="another/1/1/train"))
    site.orchestrator.push(finish=site_pb2.Finish(plan_id=plan.id))
    site.orchestrator.push(finish=site_pb2.Finish(plan_id=plan.id))  # as after an attach
    header = site.orchestrator.contribution(plan)[0]
    assert header.partial
    assert 1 <= header.steps < 300
    assert header.examples == max(1, round(40 * header.steps / 300))


def test_a_plan_that_is_to_finish_before_it_begins_does_one_step(site: Site) -> None:
    first = site.plan(params={"trouble": "slow"}, work=Work(steps=10))
    second = site.plan(params={"trouble": "slow"}, work=Work(steps=300))
    site.orchestrator.offer(first)
    site.orchestrator.offer(second)
    site.orchestrator.push(finish=site_pb2.Finish(plan_id=second.id))
    assert not site.orchestrator.contribution(first)[0].partial
    header = site.orchestrator.contribution(second)[0]
    assert (header.partial, header.steps, header.examples) == (True, 1, 1)


def test_a_plan_that_is_offered_again_is_told_of_again(site: Site) -> None:
    """An orchestrator that was restarted has forgotten where it is, and how long it prepared."""
    plan = site.plan(params={"trouble": "slow"}, work=Work(steps=10))
    site.orchestrator.offer(plan)
    site.orchestrator.until(lambda: site.is_training(plan), "training")
    before = len(site.orchestrator.said)
    site.orchestrator.offer(plan)

    def told() -> bool:
        later = (m.progress for m in site.orchestrator.said[before:])
        return any(p.plan_id == plan.id and p.prepared_s > 0 for p in later)

    site.orchestrator.until(told, "progress")
    site.orchestrator.contribution(plan)


def test_a_small_base_comes_with_its_plan_and_is_not_fetched(site: Site) -> None:
    plan = site.plan(seed=101)
    again = plan.model_copy(update={"attempt": 2})
    fetches = len(site.orchestrator.fetches)
    site.orchestrator.offer(plan, site.orchestrator.small(plan.base))
    came = site.orchestrator.contribution(plan)
    assert len(site.orchestrator.fetches) == fetches
    other = site.plan(seed=102)
    site.orchestrator.offer(other)
    site.orchestrator.contribution(other)
    assert len(site.orchestrator.fetches) == fetches + 1
    site.orchestrator.offer(again)  # its base is still here
    assert site.orchestrator.contribution(again)[2].digest == came[2].digest
    assert len(site.orchestrator.fetches) == fetches + 1


def test_a_small_base_is_not_believed(site: Site) -> None:
    plan = site.plan(seed=103)
    base = site.orchestrator.small(plan.base)
    base.data = base.data[:-1] + bytes([base.data[-1] ^ 1])
    site.orchestrator.offer(plan, base)
    assert site.orchestrator.outcome(plan).error == "DataCorrupt"
    other = site.plan(seed=104)
    foreign = site.orchestrator.small(site.plan(seed=105).base)
    site.orchestrator.offer(other, foreign)
    assert site.orchestrator.outcome(other).error == "DataCorrupt"
    short = site.plan(seed=106)
    base = site.orchestrator.small(short.base)
    base.data = base.data[:-1]
    site.orchestrator.offer(short, base)  # what is missing is fetched
    site.orchestrator.contribution(short)


def test_the_same_work_again_gives_the_same_bits(site: Site) -> None:
    plan = site.plan(params={"dropout": 0.3})
    again = plan.model_copy(update={"attempt": 2})
    assert again.work_digest == plan.work_digest
    site.orchestrator.offer(plan)
    first = site.orchestrator.contribution(plan)
    site.orchestrator.offer(again)
    second = site.orchestrator.contribution(again)
    assert first[2].digest == second[2].digest


@pytest.mark.parametrize(
    "at", ["contribute.answered", "contribute.verdict.kept", "contribute.settled"]
)
def test_the_same_work_is_offered_while_its_answer_comes(site: Site, at: str) -> None:
    plan = site.plan()
    Fault(at, do="delay", process="link", seconds=0.5).put(site.faults)
    site.orchestrator.offer(plan)
    site.orchestrator.contribution(plan)
    wait_for(site.faults / DONE, 60)
    again = plan.model_copy(update={"attempt": 2})
    site.orchestrator.offer(again)
    site.orchestrator.contribution(again)


def test_state_is_found_again_and_what_stays_here_is_not_sent(site: Site) -> None:
    plan = site.plan(task="Personal")
    site.orchestrator.offer(plan)
    header = site.orchestrator.contribution(plan)[0]
    manifest = shared(plan)
    assert all(not t.name.startswith("1.") for t in manifest)
    assert header.manifest == manifest.digest

    follow = plan.model_copy(update={"round": 2, "last_counted": header.digest})
    fresh = plan.model_copy(update={"round": 2, "run": "other"})
    lost = plan.model_copy(update={"round": 2, "run": "lost", "last_counted": "0" * 64})
    found = []
    for later in (follow, fresh, lost):
        site.orchestrator.offer(later)
        found.append(site.orchestrator.contribution(later))
    assert found[0][2].digest != found[1][2].digest
    assert found[2][2].digest == found[1][2].digest
    assert found[2][0].metrics["train_state_missing"] == 1.0


def test_assess_sends_sums_and_reassess_calibrated_ones(site: Site) -> None:
    plan = site.plan(kind="assess")
    site.orchestrator.offer(plan)
    header, _, _, payload = site.orchestrator.contribution(plan)
    sums = unpack(header, Manifest(()), payload)
    assert header.examples == 30
    assert (float(sums["val/n"]), float(sums["test/n"])) == (30, 25)
    assert 0 <= float(sums["val/correct"]) <= 30

    again = plan.model_copy(update={"kind": "reassess"})
    site.orchestrator.offer(again)
    header = site.orchestrator.contribution(again)[0]
    assert "val_calibrated/nll" in header.payload_names
    assert "val/nll" not in header.payload_names


def test_a_first_base(site: Site) -> None:
    plan = site.plan(kind="init", task="Frozen")
    site.orchestrator.offer(plan)
    header, _, _, payload = site.orchestrator.contribution(plan)
    work = workload_of(plan)
    found = unpack(header, work.shared, payload)
    assert bytes(found["init/manifest"].tolist()) == work.shared.encoded
    assert torch.equal(found["4.weight"], work.state()["4.weight"])
    assert bytes(found["init/frozen_manifest"].tolist()) == work.frozen.encoded
    assert len(found["init/frozen"]) == work.frozen.nbytes


@pytest.mark.parametrize(("task", "fetched"), [("Frozen", False), ("Unlike", True)])
def test_a_frozen_part_is_fetched_only_where_it_is_not(
    site: Site, task: str, fetched: bool
) -> None:
    # "Unlike" builds another body than the one that the plan names.
    plan = site.plan(task=task)
    frozen = base_of(site.orchestrator.folder, plan_of(run="f", task="Frozen"), "frozen")
    digest = site.orchestrator.publish(*frozen)
    plan = plan.model_copy(update={"frozen": digest})
    site.orchestrator.offer(plan)
    header, *_ = site.orchestrator.contribution(plan)
    assert (site.home / "cache" / f"{digest}.data").exists() is fetched
    assert header.manifest == shared(plan).digest
    assert all(not t.name.startswith("0.") for t in shared(plan))


# -- a trainer that fails --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("segfault", ["killed by SIGSEGV at site_tasks.py:", "while training"]),
        ("kill", ["killed by SIGKILL", "while training"]),
        ("memory", ["ran out of memory", "RuntimeError at site_tasks.py:"]),
        ("raise", ["ValueError at site_tasks.py:"]),
        ("nan", ["the loss became nan at step 2"]),
    ],
)
def test_a_trainer_that_fails_is_named_and_the_site_stays(
    site: Site, trouble: str, words: list[str]
) -> None:
    streams = len(site.orchestrator.streams)
    plan = site.plan(params={"trouble": trouble})
    site.orchestrator.offer(plan)
    outcome = site.orchestrator.outcome(plan)
    assert outcome.error == "TaskFailed"
    assert outcome.message.startswith("site north: ")
    for word in words:
        assert word in outcome.message
    assert "patient" not in outcome.message
    assert len(site.orchestrator.streams) == streams  # the same stream all along

    healthy = site.plan()
    site.orchestrator.offer(healthy)
    site.orchestrator.contribution(healthy)


def test_what_a_task_prints_is_no_event(site: Site) -> None:
    plan = site.plan(params={"trouble": "print"})
    site.orchestrator.offer(plan)
    assert site.orchestrator.contribution(plan)[0].steps == 4
    assert "progress!" in (site.home / "log/trainer.log").read_text()


def test_a_base_of_another_model_is_refused_by_name(site: Site) -> None:
    plan, other = site.plan(), site.plan(params={"hidden": 16})
    plan = plan.model_copy(update={"base": other.base, "manifest": other.manifest})
    site.orchestrator.offer(plan)
    outcome = site.orchestrator.outcome(plan)
    assert outcome.error == "ManifestInvalid"
    assert "tensor 0.weight is float32 [8, 4]" in outcome.message


# -- policy ----------------------------------------------------------------------------------------


def test_policy_refuses_and_says_which_key(site: Site) -> None:
    for changes, words in (
        ({"work": Work(epochs=51)}, "policy.max_epochs"),
        ({"stack": ("temperature",)}, "strategy temperature"),
        ({"task": "Streamed"}, "no task Streamed"),
    ):
        plan = plan_of(run=f"p{len(words)}", base="0" * 64, **changes)
        site.orchestrator.offer(plan)
        outcome = site.orchestrator.outcome(plan)
        assert outcome.error == "PolicyRefused"
        assert words in outcome.message


def test_a_cancelled_plan_stops_and_the_next_one_runs(site: Site) -> None:
    plan = site.plan(params={"trouble": "slow", "at_step": 1}, work=Work(steps=100_000))
    site.orchestrator.offer(plan)
    site.orchestrator.until(lambda: site.is_training(plan), "training")
    site.orchestrator.offer(plan)  # twice is once
    site.orchestrator.push(cancel=site_pb2.Cancel(plan_id=plan.id, reason="test"))
    healthy = site.plan()
    site.orchestrator.offer(healthy)
    site.orchestrator.contribution(healthy)
    assert not any(c[0].plan_id == plan.id for c in site.orchestrator.contributions.values())


def test_work_that_counts_for_a_later_round_is_finished_and_that_rounds_not_begun(
    site: Site,
) -> None:
    orchestrator = site.orchestrator

    def at_work(takes: bool) -> tuple[Plan, Plan]:
        """A plan under way, and one of the next round that was offered then."""
        first = site.plan(params={"trouble": "slow"}, work=Work(steps=8))
        second = site.plan(params={"trouble": "slow"}, work=Work(steps=1), seed=8)
        accepts = (second.base, first.base if takes else "0" * 64)
        second = second.model_copy(update={"run": first.run, "round": 2, "accepts": accepts})
        orchestrator.offer(first)
        orchestrator.until(lambda: site.is_training(first), "training")
        orchestrator.offer(second)
        return first, second

    def begun(plan: Plan) -> int:
        events = site.agent.events()
        return sum(e["event"] == "plan begins" and e.get("plan") == plan.id for e in events)

    first, second = at_work(takes=True)
    orchestrator.answers[first.id] = (common_pb2.Answer.COUNTED, second.id)
    assert orchestrator.contribution(first)[0].steps == 8
    assert site.is_training(second), "it is told of as what is asked now"
    both = [first.id, second.id]
    orchestrator.until(lambda: any(e.get("plans") == both for e in site.agent.events()), "answered")
    third = second.model_copy(update={"round": 3, "accepts": (second.base, second.base)})
    orchestrator.offer(third)
    assert orchestrator.contribution(third)[0].plan_id == third.id
    orchestrator.offer(first)  # it was on its way when the answer for a later round came
    after = site.plan()
    orchestrator.offer(after)
    orchestrator.contribution(after)
    assert (begun(first), begun(second)) == (1, 0)

    first, second = at_work(takes=True)
    orchestrator.answers[first.id] = (common_pb2.Answer.LATE, first.id)
    orchestrator.contribution(first)
    orchestrator.contribution(second)  # what did not count is no reason not to do it

    first, second = at_work(takes=False)
    orchestrator.contribution(second)
    assert all(header.plan_id != first.id for header, *_ in orchestrator.contributions.values())

    first, second = at_work(takes=True)
    orchestrator.push(cancel=site_pb2.Cancel(plan_id=second.id, reason="the round was closed"))
    third = site.plan()
    orchestrator.offer(third)
    orchestrator.contribution(third)
    assert all(header.plan_id != first.id for header, *_ in orchestrator.contributions.values())


# -- transfers -------------------------------------------------------------------------------------


def test_interrupted_transfers_send_only_what_is_missing(site: Site) -> None:
    plan = site.plan(params={"hidden": 150_000}, work=Work(steps=1))
    site.orchestrator.break_fetch_after = 2
    site.orchestrator.break_upload_after = 2
    fetches, uploads = len(site.orchestrator.fetches), len(site.orchestrator.uploads)
    site.orchestrator.offer(plan)
    _, _, index, _ = site.orchestrator.contribution(plan)
    chunks = list(range(len(index.chunks)))
    assert len(chunks) > 4
    first, second = site.orchestrator.uploads[uploads:]
    assert first == [0, 1]
    assert second == chunks[2:]
    down = site.orchestrator.fetches[fetches:]
    assert len(down) == 2
    assert sorted(down[0] + down[1]) == list(
        range(len(site.orchestrator.models[plan.base][2].chunks))
    )


def test_the_orchestrator_restarts_and_what_is_finished_is_not_trained_again(site: Site) -> None:
    plan = site.plan(params={"hidden": 150_000}, work=Work(steps=1), round=2)
    site.orchestrator.break_upload_after = 2
    site.orchestrator.offer(plan)
    site.orchestrator.until(lambda: site.orchestrator.break_upload_after is None, "the break")
    site.orchestrator.stop()
    site.orchestrator.start()
    site.orchestrator.attached()
    hellos = [m.hello for m in site.orchestrator.said if m.WhichOneof("kind") == "hello"]
    site.orchestrator.offer(plan)
    header = site.orchestrator.contribution(plan)[0]
    assert plan.id in hellos[-1].plans or header.plan_id == plan.id
    begun = [e for e in site.agent.events() if e["event"] == "plan begins" and e["plan"] == plan.id]
    assert len(begun) == 1


def test_an_offer_that_the_answer_overtook_is_not_done_again(site: Site) -> None:
    """A large contribution is answered on another connection than plans are offered on."""
    plan = site.plan(work=Work(epochs=1))
    site.orchestrator.offer(plan)
    site.orchestrator.contribution(plan)

    def times(event: str) -> int:
        return sum(e["event"] == event and e.get("plan") == plan.id for e in site.agent.events())

    site.orchestrator.until(
        lambda: any(e.get("plans") == [plan.id] for e in site.agent.events()), "the answer"
    )
    site.orchestrator.offer(plan)
    later = site.plan(round=2, work=Work(epochs=1))
    site.orchestrator.offer(later)  # is heard after it
    site.orchestrator.contribution(later)
    assert times("plan begins") == 1

    site.orchestrator.stop()
    site.orchestrator.start()
    site.orchestrator.attached()
    site.orchestrator.contributions.clear()
    site.orchestrator.offer(plan)  # who comes back from a backup wants it once more
    site.orchestrator.contribution(plan)
    assert times("plan begins") == 2


@pytest.mark.parametrize("answered", [True, False])
def test_an_exchange_that_is_opened_again_asks_for_other_work(site: Site, answered: bool) -> None:
    """Of several plug-ins each is assessed alone: another model, under the same plan's id."""
    if answered:
        plan = site.plan(kind="assess")
        site.orchestrator.offer(plan)
        site.orchestrator.contribution(plan)
        site.orchestrator.until(
            lambda: any(e.get("plans") == [plan.id] for e in site.agent.events()), "the answer"
        )
        site.orchestrator.contributions.clear()
        other = plan.model_copy(update={"base": site.plan(seed=99).base})
    else:
        plan = site.plan(params={"trouble": "slow"}, work=Work(steps=100_000))
        site.orchestrator.offer(plan)
        site.orchestrator.until(lambda: site.is_training(plan), "training")
        other = plan.model_copy(update={"work": Work(steps=2)})
    site.orchestrator.offer(other)
    assert site.orchestrator.contribution(other)[0].work_digest == other.work_digest


def test_a_small_contribution_goes_out_on_the_control_stream(site: Site) -> None:
    orchestrator = site.orchestrator
    orchestrator.stop()
    orchestrator.small_bytes = 64 << 10
    orchestrator.start()
    orchestrator.attached()
    uploads = len(orchestrator.uploads)
    # It is sent until there is an answer; what is damaged there is no reason to give it up here.
    orchestrator.put_off = ["Unavailable", "DataCorrupt"]
    orchestrator.offer(plan := site.plan(seed=104))
    header, _, index, payload = orchestrator.contribution(plan)
    assert orchestrator.whole == [plan.id] * 3
    assert payload.stat().st_size == index.nbytes
    assert set(unpack(header, shared(plan), payload)) == {t.name for t in shared(plan)}
    orchestrator.hang_up = True
    orchestrator.offer(plan := site.plan(seed=105))
    orchestrator.contribution(plan)
    assert orchestrator.whole[3:] == [plan.id] * 2
    assert len(orchestrator.uploads) == uploads
    # A larger one is uploaded as ever.
    orchestrator.offer(plan := site.plan(params={"hidden": 150_000}, work=Work(steps=1)))
    orchestrator.contribution(plan)
    assert len(orchestrator.uploads) == uploads + 1
    assert len(orchestrator.whole) == 5  # what was answered is not sent again
    orchestrator.stop()
    orchestrator.small_bytes = 0
    orchestrator.start()
    orchestrator.attached()


# -- life ------------------------------------------------------------------------------------------


def test_a_large_contribution_waits_for_its_turn_behind_its_head(site: Site) -> None:
    orchestrator = site.orchestrator
    plan = site.plan()
    orchestrator.stop()
    orchestrator.turn_bytes = 1
    orchestrator.start()
    orchestrator.attached()
    orchestrator.offer(plan)
    orchestrator.until(lambda: plan.id in orchestrator.heads, "the head")
    assert not orchestrator.out_of_turn.wait(0.5)
    # The line is cut while it waits, and the next one begins with the head again.
    orchestrator.stop()
    orchestrator.heads.clear()
    orchestrator.start()
    orchestrator.until(lambda: plan.id in orchestrator.heads, "the head again")
    assert not orchestrator.out_of_turn.wait(0.2)
    orchestrator.turn.set()
    orchestrator.contribution(plan)


def test_status_pause_and_resume(site: Site) -> None:
    assert ask(site.home, "status")["attached"]
    ask(site.home, "pause")
    site.orchestrator.until(
        lambda: site.orchestrator.said[-1].heartbeat.paused, "a heartbeat that says so"
    )
    assert ask(site.home, "status")["paused"]
    plan = site.plan()
    site.orchestrator.offer(plan)
    ask(site.home, "resume")
    site.orchestrator.contribution(plan)


def test_a_second_agent_on_the_same_home_is_refused(site: Site) -> None:
    done = subprocess.run(
        site_command("run", "--home", str(site.home)), capture_output=True, text=True
    )
    assert done.returncode == 75
    assert "another agent" in done.stderr


def test_the_trainer_has_no_key(site: Site) -> None:
    trainer = psutil.Process(ask(site.home, "status")["trainer_pid"])
    told = " ".join([*trainer.cmdline(), *trainer.environ().values()])
    assert "keys" not in told
    assert all("keys" not in f.path for f in trainer.open_files())
    assert not trainer.net_connections()


def test_a_join_token_works_once(site: Site, tmp_path: Path) -> None:
    done = subprocess.run(
        site_command("join", site.token, "--home", str(tmp_path / "thief")),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 77
    assert "used before" in done.stderr
    assert (site.home / "keys").stat().st_mode & 0o777 == 0o700
    assert (site.home / "keys/key.pem").stat().st_mode & 0o777 == 0o600


def test_renewal_keeps_the_key(site: Site) -> None:
    before = (site.home / "keys/cert.pem").read_bytes()
    key = (site.home / "keys/key.pem").read_bytes()
    streams = len(site.orchestrator.streams)
    site.orchestrator.push(renew=site_pb2.Renew())
    site.orchestrator.until(lambda: len(site.orchestrator.streams) > streams, "a new stream")
    assert (site.home / "keys/cert.pem").read_bytes() != before
    assert (site.home / "keys/key.pem").read_bytes() == key


def test_a_revoked_site_says_so_and_comes_back_when_it_is_let_in(site: Site) -> None:
    mine = fingerprint(load_certificate((site.home / "keys/cert.pem").read_bytes()))
    streams = len(site.orchestrator.streams)
    site.orchestrator.revoked.add(mine)
    site.orchestrator.streams[-1].put(None)
    site.orchestrator.until(lambda: site.orchestrator.turned_away, "a call that is refused")
    site.orchestrator.revoked.clear()
    site.orchestrator.until(lambda: len(site.orchestrator.streams) > streams, "a new stream")
    told = [e for e in site.agent.events() if e["event"] == "not attached"]
    assert any("revoked" in e["reason"] and e["error"] == "NotEnrolled" for e in told)


def test_leaving_a_run_removes_what_is_kept_of_it(site: Site) -> None:
    plan = site.plan()
    site.orchestrator.offer(plan)
    header = site.orchestrator.contribution(plan)[0]
    kept = site.home / "contributions" / header.digest
    assert {path.name for path in kept.iterdir()} <= {"payload", "waiting", "counted"}
    assert ask(site.home, "leave", plan.run)["removed"] == 1
    assert not kept.exists()
    site.orchestrator.until(
        lambda: any(m.leave.run == plan.run for m in site.orchestrator.said), "leave"
    )


def test_task_test_trains_a_step(site: Site) -> None:
    found = ask(site.home, "task", "test", "Clouds", "--params", '{"hidden": 3}')
    assert (found["examples"], found["val"], found["test"]) == (40, 30, 25)
    assert found["parameters"] == 4 * 3 + 3 + 2 * 3 + 3 * 2 + 2
    assert len(found["digest"]) == 64


def test_doctor_finds_nothing(site: Site) -> None:
    found = ask(site.home, "doctor")
    assert found["ok"]
    assert "up without a cap" in next(
        f["message"] for f in found["findings"] if f["about"] == "network"
    )


def test_a_foreign_or_missing_orchestrator_is_diagnosed(site: Site, tmp_path: Path) -> None:
    home = tmp_path / "copy"
    shutil.copytree(site.home / "keys", home / "keys")
    foreign = TinyOrchestrator(tmp_path / "foreign", "other")
    foreign.start()
    try:
        for address, words in (
            (foreign.address, "from another authority"),
            ("127.0.0.1:9", "not reachable"),
        ):
            (home / "site.toml").write_text(f'[network]\naddress = "{address}"\n')
            done = subprocess.run(
                site_command("doctor", "--home", str(home), "--json"),
                capture_output=True,
                text=True,
            )
            assert done.returncode == 1
            assert words in done.stdout
    finally:
        foreign.stop()


def test_kill_9_of_the_link_ends_the_trainer(site: Site) -> None:
    plan = site.plan(params={"trouble": "slow", "at_step": 1}, work=Work(steps=100_000))
    site.orchestrator.offer(plan)
    site.orchestrator.until(lambda: site.is_training(plan), "training")
    trainer = psutil.Process(ask(site.home, "status")["trainer_pid"])
    site.agent.kill()
    trainer.wait(10)

    # The next agent takes the same folder up.
    streams = len(site.orchestrator.streams)
    site.agent = RunningAgent(site.home)
    site.orchestrator.until(lambda: len(site.orchestrator.streams) > streams, "a new stream")
    healthy = site.plan()
    site.orchestrator.offer(healthy)
    site.orchestrator.contribution(healthy)
    trainer = psutil.Process(ask(site.home, "status")["trainer_pid"])
    assert site.agent.stop() == 0
    trainer.wait(10)
