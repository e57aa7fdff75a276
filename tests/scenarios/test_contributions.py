"""Contributions that must not count, or not so: what the operator reads of each, and that the run goes on.

One federation; every test is a run of it. What a site says is the real agent's, or, where no agent
would say such a thing, a forger's who holds the site's key.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from protos.faults import Fault
from protos.identity import key_pem
from protos.manifest import Manifest
from protos.plan import Plan
from protos.v1 import common_pb2, site_pb2, site_pb2_grpc
from site_agent.link.keys import Keys
from tests.support.contributor import Contributor, chunks, messages
from tests.support.field import Field
from tests.support.reading import farflung, launching
from tests.support.scene import INCOMPLETE, ended, restored, without
from tests.support.sites import ask

pytestmark = [pytest.mark.xdist_group("contributions"), pytest.mark.timeout(240)]

CALL_S = 30.0


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    field = Field(tmp_path_factory.mktemp("field"))
    with field.federation:
        yield field


@pytest.fixture
def field(own: Field) -> Iterator[Field]:
    yield own
    restored(own)


class Forger:
    """Whoever holds a site's key and speaks for it, while its agent is stopped."""

    def __init__(self, field: Field, site: str) -> None:
        self.field, self.site = field, site
        self._end = threading.Event()

    def __enter__(self) -> Forger:
        federation = self.field.federation
        federation.stop_site(self.site)
        self.keys = keys = Keys.load(federation.folder(self.site) / "keys")
        self.writer = Contributor.__new__(Contributor)
        self.writer.name, self.writer.key = self.site, keys.key
        credentials = grpc.ssl_channel_credentials(
            keys.authority, key_pem(keys.key), keys.certificate
        )
        self.channel = grpc.secure_channel(keys.address, credentials)

        def said() -> Iterator[site_pb2.FromSite]:
            yield site_pb2.FromSite(hello=site_pb2.Hello(version="0", protocol=1))
            while not self._end.wait(0.1):
                yield site_pb2.FromSite(heartbeat=site_pb2.Heartbeat(sequence=1))

        self.manifests: dict[str, Manifest] = {}
        self.stream = site_pb2_grpc.ControlStub(self.channel).Attach(said(), timeout=2 * CALL_S)
        assert next(self.stream).HasField("welcome")
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.stream.cancel()
        self.channel.close()
        self.field.federation.start_site(self.site)

    def plan(self) -> Plan:
        """The next plan to train, and its base."""
        for message in self.stream:
            if message.HasField("plan"):
                plan = Plan.decode(message.plan.plan)
                if plan.kind == "train":
                    return plan
        raise AssertionError("the stream ended")

    def fetch(self, name: str) -> Manifest:
        """The manifest of a plan's base."""
        if name in self.manifests:
            return self.manifests[name]
        request = site_pb2.FetchRequest(digest=name)
        head = next(site_pb2_grpc.BulkStub(self.channel).FetchModel(request, timeout=CALL_S)).head
        self.manifests[name] = Manifest.decode(head.manifest)
        return self.manifests[name]

    def contribution(
        self, plan: Plan, value: float = 0.01, **changes: Any
    ) -> tuple[site_pb2.ContributionHead, bytes]:
        """A well-formed contribution, but for ``changes`` of its header."""
        manifest = self.fetch(plan.base)
        updates = {t.name: torch.full(t.shape, value) for t in manifest}
        data = self.writer.payload(manifest, updates)
        return self.writer.head(plan, data, manifest.digest, **changes), data

    def send(self, head: site_pb2.ContributionHead, data: bytes) -> common_pb2.Answer:
        stub = site_pb2_grpc.BulkStub(self.channel)
        return stub.Contribute(messages(head, chunks(data)), timeout=CALL_S)


# -- what is in it -----------------------------------------------------------------------------------


def test_infinity_is_refused_with_site_and_tensor(field: Field) -> None:
    (field.switches["south"] / "fault").write_text("inf")
    run = field.federation.launch(field.config("infinite", rounds=1))
    without(field, run, "south", "site south, tensor unseen: it holds NaN or infinity")


def test_a_loss_that_becomes_nan_is_named(field: Field) -> None:
    local = {"work": {"epochs": 4}, "batch_size": 20, "lr": 1e30}
    run = field.federation.launch(field.config("diverges", rounds=1, local=local))
    view = field.federation.wait(run, 120)
    assert view.state == "paused"
    told = launching(field.federation, run)
    assert told.code == INCOMPLETE
    assert told.text.count(": the loss became nan at step ") >= 2


def test_an_update_of_zero_counts_and_is_told(field: Field) -> None:
    (field.switches["east"] / "fault").write_text("zero")
    run = field.federation.launch(field.config("zero", rounds=1, strategy=[{"name": "int8"}]))
    _, rounds, told = ended(field, run)
    assert not rounds[0].missing
    assert "site east: its update in round 1 is zero" in told.text


def test_an_exploding_update_is_held_with_its_site_and_norm(field: Field) -> None:
    (field.switches["east"] / "fault").write_text("explode")
    config = field.config("explodes", rounds=1, gate={"norm": 5.0, "on_hold": "wait"})
    run = field.federation.launch(config)
    view, rounds, told = ended(field, run, "paused")
    words = "site east: the norm of its update is"
    assert view.reason.startswith("waiting for decision")
    assert words in view.reason
    assert words in told.text
    assert words in farflung(field.federation, "runs").text
    assert told.code == INCOMPLETE
    assert rounds[0].state == "held"
    assert farflung(field.federation, "reject", run).code == 0
    assert field.federation.wait(run, 60).state == "finished"
    assert field.federation.rounds(run)[0].state == "abandoned"


# -- what it says of itself ------------------------------------------------------------------------


def test_a_contribution_from_another_base_is_refused(field: Field) -> None:
    with Forger(field, "east") as forger:
        run = field.federation.launch(field.config("other-base", rounds=1, assess={"every": 0}))
        head, data = forger.contribution(forger.plan(), base="0" * 64)
        assert forger.send(head, data).verdict == common_pb2.Answer.REFUSED
        without(field, run, "east", "site east", "base")


def test_a_stale_contribution_does_not_count_again(field: Field) -> None:
    """That of round 1, sent once more in round 2."""
    with Forger(field, "east") as forger:
        run = field.federation.launch(field.config("stale", rounds=2, assess={"every": 0}))
        head, data = forger.contribution(forger.plan())
        assert forger.send(head, data).verdict == common_pb2.Answer.COUNTED
        forger.plan()
        again = forger.send(head, data)
        assert again.verdict == common_pb2.Answer.COUNTED, "as it was answered before"
        forger._end.set()
        forger.stream.cancel()
        _, rounds, told = ended(field, run)
        assert not rounds[0].missing
        assert set(rounds[1].missing) == {"east"}
        assert "round 2 went on without east: gone" in told.text
        assert farflung(field.federation, "verify", run).code == 0


def test_of_two_contributions_the_first_counts(field: Field) -> None:
    with Forger(field, "east") as forger:
        run = field.federation.launch(field.config("twice", rounds=1, assess={"every": 0}))
        plan = forger.plan()
        first, data = forger.contribution(plan)
        assert forger.send(first, data).verdict == common_pb2.Answer.COUNTED
        second, other = forger.contribution(plan, value=9.0)
        answer = forger.send(second, other)
        assert answer.verdict == common_pb2.Answer.REFUSED
        assert "another one was counted" in answer.message
        _, rounds, told = ended(field, run)
        assert not rounds[0].missing
        row = next(row for row in rounds[0].sites if row.site == "east")
        assert row.norm is not None
        assert row.norm < 1, "the second one's would be hundreds"
        assert told.code == 0
        assert farflung(field.federation, "verify", run).code == 0


def test_nobody_contributes_for_another_site(field: Field) -> None:
    with Forger(field, "east") as forger:
        run = field.federation.launch(field.config("for-another", rounds=1, assess={"every": 0}))
        head, data = forger.contribution(forger.plan(), site="north")
        assert forger.send(head, data).verdict == common_pb2.Answer.REFUSED
        rounds = without(field, run, "east", "site east")
        assert {row.site for row in rounds[0].sites if row.state == "counted"} == {"north", "south"}


# -- when it comes ------------------------------------------------------------------------------------


def test_a_contribution_that_comes_too_late_ends_no_run(field: Field) -> None:
    """Trained in time, and held up behind the deadline."""
    field.federation.fail("east", Fault("contribute.saying", do="delay", seconds=14.0))
    cohort = {"quorum": 2, "deadline_s": 9}
    run = field.federation.launch(field.config("late", rounds=2, cohort=cohort))
    _, rounds, told = ended(field, run)
    assert "did not answer in time: sending" in rounds[0].missing["east"]
    assert "round 1 went on without east: did not answer in time: sending" in told.text
    assert [r.state for r in rounds] == ["committed"] * 2


def test_the_sites_that_answered_in_vain_are_not_forgotten_in_the_reason(field: Field) -> None:
    """A quorum that is never reached pauses the run, and says who was missing and why."""
    gates = [field.switches[site] / "gate" for site in ("east", "south")]
    for gate in gates:
        gate.touch()
    cohort = {"quorum": 2, "deadline_s": 60, "attempts": 2}
    run = field.federation.launch(field.config("no-quorum", rounds=1, cohort=cohort))

    def north_counted() -> bool:
        rows = field.federation.rounds(run)[0].sites if field.federation.rounds(run) else ()
        return any(row.site == "north" and row.state == "counted" for row in rows)

    field.federation.await_that(north_counted, "north counted", 60)
    (field.switches["east"] / "fault").write_text("raise")
    (field.switches["south"] / "fault").write_text("device")
    for gate in gates:
        gate.unlink()
    view, _, told = ended(field, run, "paused")
    for words in (
        "the quorum of 2 can't be reached any more",
        "east: site east: the task failed: ValueError",
        "south: site south: the device failed",
    ):
        assert words in view.reason
        assert words in told.text
    assert told.code == INCOMPLETE
    # What north had finished is not trained again once the others are well.
    assert field.steps("north") == 12
    field.clear()
    field.federation.client.extend(run, 1)
    assert field.federation.wait(run, 60).state == "finished"
    assert field.steps("north") == 0


def test_an_assessment_that_fails_is_told_and_not_taken_for_a_score(field: Field) -> None:
    """F10: results of an evaluation that are not there must not look like results."""
    for site in ("east", "south"):
        field.federation.fail(site, Fault("assess.summed", do="raise", error="EIO"))
    run = field.federation.launch(field.config("unassessed", rounds=1))
    _, rounds, told = ended(field, run)
    assert not rounds[0].assessed
    assert rounds[0].scores == {}
    assert {"east", "south"} <= set(rounds[0].unassessed)
    assert rounds[0].missing == {}
    assert "unassessed" in farflung(field.federation, "rounds", run).text
    assert "OSError" in told.text
    assert told.code == INCOMPLETE


def test_a_site_that_leaves_is_named_and_the_others_go_on(field: Field, tmp_path: Path) -> None:

    gate = field.switches["east"] / "gate"
    gate.touch()
    run = field.federation.launch(field.config("leaves", rounds=1))
    field.federation.await_that((field.switches["east"] / "reached").exists, "training", 60)
    assert ask(field.federation.folder("east"), "leave", run)["told"]
    gate.unlink()
    without(field, run, "east", "the site left the run")
