"""Views from ledger rows: what happened, who was missing and why, which round was the best."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.ledger import RoundRow
from orchestrator.sessions import Session, Sessions
from orchestrator.troubles import Troubles
from orchestrator.viewing import Viewing, best_round
from protos.errors import NotFound
from protos.v1 import site_pb2
from tests.support.workbench import Workbench

SUMMARY: dict[str, Any] = {
    "counted": ["north", "south"],
    "missing": {},
    "assessed": True,
    "scores": {"val.accuracy": 0.5, "val.nll": 1.0, "test.accuracy": 0.625, "test.ece": 0.04},
    "wire_bytes": 2_500_000,
    "relative_change": 0.25,
    "learning_rate": [0.1, 0.025],
    "work": {"epochs": 5.0},
    "seconds": {"training": 3.0},
    "sites": [{"site": "north", "state": "counted", "norm": 2.0}],
    "plugins": [{"name": "feddf", "state": "done"}],
    "calibration": {"temperature": {"t": 1.5}},
    "reliability": {"val": {"count": [2.0], "confidence": [0.5], "accuracy": [None]}},
    "finished": 50.0,
}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(tmp_path)
    bench.enrol("north", "south")
    bench.run("r", rounds=4)
    yield bench
    bench.close()


@pytest.fixture
def sessions() -> Iterator[Sessions]:
    sessions = Sessions(3600.0, lambda site: None, lambda site: None)
    yield sessions
    sessions.drain("the end")


@pytest.fixture
def viewing(bench: Workbench, sessions: Sessions) -> Viewing:
    troubles = Troubles(bench.ledger, lambda level, site, text: None)
    return Viewing(bench.ledger, bench.board, sessions, troubles)


def summary(**changes: Any) -> dict[str, Any]:
    return {**SUMMARY, **changes}


def scored(number: int, **scores: float) -> RoundRow:
    return RoundRow(
        "r", number, 1, summary={"scores": {k.replace("_", "."): v for k, v in scores.items()}}
    )


# -- the best round ---------------------------------------------------------------------------------


def test_best_is_by_validation_accuracy_then_likelihood_then_the_newest() -> None:
    rows = [
        scored(1, val_accuracy=0.5),
        scored(2, val_accuracy=0.75),
        scored(3, val_accuracy=0.625),
    ]
    assert best_round(rows) is rows[1]
    rows = [scored(k, val_accuracy=0.5, val_nll=n) for k, n in ((1, 1.0), (2, 0.5), (3, 0.75))]
    assert best_round(rows) is rows[1]
    rows = [scored(k, val_accuracy=0.5, val_nll=1.0) for k in (1, 2)]
    assert best_round(rows) is rows[1]
    rows = [scored(k, val_nll=n) for k, n in ((1, 1.0), (2, 2.0))]
    assert best_round(rows) is rows[0]
    assert best_round([]) is None


def test_best_is_never_chosen_by_what_is_only_reported() -> None:
    rows = [
        scored(1, val_accuracy=0.5, test_accuracy=0.5),
        scored(2, val_accuracy=0.25, test_accuracy=1),
    ]
    assert best_round(rows) is rows[0]


def test_unassessed_rounds_are_best_only_among_themselves() -> None:
    rows = [scored(1, val_accuracy=0.01), scored(2)]
    assert best_round(rows) is rows[0]
    assert best_round([scored(1), scored(2)]) == scored(2)


# -- rounds -----------------------------------------------------------------------------------------


def test_a_committed_round_is_what_its_summary_says(bench: Workbench, viewing: Viewing) -> None:
    bench.commit("r", 0)
    row = bench.commit("r", 1, summary=SUMMARY)
    bench.board.begin("r", 1, 1, ["north"])  # what is live no longer matters
    (view,) = viewing.rounds("r")
    assert (view.round, view.attempt, view.state) == (1, 1, "committed")
    assert view.model == row.model
    assert view.assessed
    assert view.scores == SUMMARY["scores"]
    assert view.learning_rate == (0.1, 0.025)
    assert view.relative_change == 0.25
    assert view.wire_bytes == 2_500_000
    assert view.seconds == {"training": 3.0}
    assert [(s.site, s.state, s.norm) for s in view.sites] == [("north", "counted", 2.0)]
    assert view.plugins[0].name == "feddf"
    assert view.reliability["val"].accuracy == (None,)
    assert view.committed is not None
    assert view.deadline is None


def test_missing_sites_are_named_with_the_reason(bench: Workbench, viewing: Viewing) -> None:
    bench.commit("r", 0)
    missing = {"south": "site south, tensor w: it holds NaN"}
    unassessed = {"north": "gone", "south": "gone"}
    bench.commit("r", 1, summary=summary(missing=missing, unassessed=unassessed))
    round = viewing.rounds("r")[0]
    assert (round.missing, round.unassessed) == (missing, {"north": "gone"})
    assert (
        viewing.run("r").diagnosis
        == "Round 1 went without south: site south, tensor w: it holds NaN"
    )


def test_the_round_under_way_is_the_boards(bench: Workbench, viewing: Viewing) -> None:
    assert viewing.attempt(*bench.board.key) is None
    bench.commit("r", 0)
    draft = {"schedule": {"lr": 0.5, "decay": 0.5}, "work": {"epochs": 2.0, "steps": None}}
    bench.ledger.plan_round(RoundRow("r", 1, 1, draft=draft, started=100.0, deadline_s=60.0))
    bench.board.begin("r", 1, 1, ["north", "south"])
    bench.board.set_state("north", "counted")
    bench.board.note("north", sent=10)
    view = viewing.attempt(*bench.board.key)
    assert view is not None
    assert [(s.site, s.state) for s in view.sites] == [("north", "counted"), ("south", "asked")]
    assert view.wire_bytes == 10
    assert view.deadline == 160.0
    assert view.learning_rate == (0.5, 0.25)
    assert view.work == {"epochs": 2.0}
    assert view.scores == {}


def test_an_abandoned_attempt_says_why(bench: Workbench, viewing: Viewing) -> None:
    bench.commit("r", 0)
    bench.ledger.plan_round(RoundRow("r", 1, 1))
    bench.ledger.abandon_round("r", 1, 1, "the quorum of 2 can't be reached any more")
    (view,) = viewing.rounds("r")
    assert (view.state, view.reason) == ("abandoned", "the quorum of 2 can't be reached any more")


def test_round_zero_is_no_round_of_the_table(bench: Workbench, viewing: Viewing) -> None:
    bench.commit("r", 0)
    bench.board.begin("r", 0, 1, ["north"])
    assert viewing.rounds("r") == []
    assert viewing.attempt(*bench.board.key) is None


# -- runs -------------------------------------------------------------------------------------------


def test_a_run_that_has_just_been_queued(bench: Workbench, viewing: Viewing) -> None:
    view = viewing.run("r")
    assert (view.state, view.committed, view.best, view.current) == ("queued", 0, None, None)
    assert view.headline == "Queued after 0 of 4 rounds"
    assert view.diagnosis == ""
    assert view.sites == ("north", "south")
    assert view.strategies == ("co_learning",)


def test_a_run_under_way(bench: Workbench, viewing: Viewing) -> None:
    bench.ledger.set_run("r", state="running", started=1.0)
    bench.commit("r", 0)
    assert viewing.run("r").headline.startswith("Round 1 of 4 · starting")
    bench.commit("r", 1, summary=SUMMARY)
    bench.commit("r", 2, summary=summary(scores={"val.accuracy": 0.25}))
    bench.ledger.plan_round(RoundRow("r", 3, 1))
    bench.board.begin("r", 3, 1, ["north"])
    view = viewing.run("r")
    assert (view.committed, view.best, view.current) == (2, 1, 3)
    assert view.headline.startswith("Round 3 of 4 · learning")
    assert "val 25.0 %" in view.headline
    assert "2 of 2 sites" in view.headline
    assert "5 MB exchanged" in view.headline
    bench.ledger.set_run("r", reason="stops after this round")
    assert viewing.run("r").headline.startswith("Round 3 of 4 · stops after this round · ")
    assert view.wire_bytes == 5_000_000
    assert not view.needs_action


def test_a_finished_run(bench: Workbench, viewing: Viewing) -> None:
    bench.commit("r", 0)
    last = bench.commit("r", 1, summary=SUMMARY)
    bench.ledger.set_run("r", state="finished")
    view = viewing.run("r")
    assert view.headline.startswith("Finished after 1 rounds · test 62.5 % · ECE 4.0 %")
    assert view.scores == SUMMARY["scores"]
    assert view.model == last.model
    assert view.eta_s is None
    assert view.current is None


def test_a_paused_run_says_what_to_act_on(bench: Workbench, viewing: Viewing) -> None:
    bench.ledger.set_run("r", state="paused", reason="round 1: the quorum was not there")
    view = viewing.run("r")
    assert view.needs_action
    assert view.diagnosis == view.reason == "round 1: the quorum was not there"


@pytest.mark.parametrize(
    ("changes", "diagnosis"),
    [
        (
            {"plugins": [{"name": "feddf", "state": "skipped", "reason": "out of memory"}]},
            "feddf was skipped in round 1: out of memory",
        ),
        (
            {"assessed": False, "unassessed": {"south": "gone"}},
            "Round 1 is unassessed: too few sites evaluated it",
        ),
        ({"assessed": False, "unassessed": {}}, ""),
        ({}, ""),
    ],
    ids=["skipped", "unassessed", "not asked for", "well"],
)
def test_the_newest_finding(
    bench: Workbench, viewing: Viewing, changes: dict[str, Any], diagnosis: str
) -> None:
    bench.commit("r", 0)
    bench.commit("r", 1, summary=summary(**changes))
    assert viewing.run("r").diagnosis == diagnosis


def test_runs_that_are_not_there(viewing: Viewing) -> None:
    assert [r.name for r in viewing.runs()] == ["r"]
    with pytest.raises(NotFound):
        viewing.run("other")
    with pytest.raises(NotFound):
        viewing.rounds("other")


# -- sites ------------------------------------------------------------------------------------------


def test_sites_are_shown_as_they_are(
    bench: Workbench, viewing: Viewing, sessions: Sessions
) -> None:
    bench.ledger.invite("east", "token", 4e9)
    hello = site_pb2.Hello(
        version="1.2", protocol=1, device="cpu", packages={"torch": "2"},
        tasks=[site_pb2.TaskOffer(name="t", digest="d")],
    )  # fmt: skip
    states = {s.name: s.state for s in viewing.sites()}
    assert states == {
        "east": "never attached",
        "north": "never attached",
        "south": "never attached",
    }
    assert viewing.site("east").invited
    assert not viewing.site("north").invited
    session = Session("north", "f", hello)
    sessions.attach(session)
    north = viewing.site("north")
    assert (north.state, north.version, north.device) == ("attached", "1.2", "cpu")
    assert (north.tasks, north.packages) == ({"t": "d"}, {"torch": "2"})
    assert north.since == session.since
    session.paused = True
    assert viewing.site("north").state == "paused"
    sessions.detach(session)
    assert viewing.site("north").state == "gone"
    assert viewing.site("north").since is not None
    bench.ledger.revoke("north")
    assert viewing.site("north").state == "revoked"
