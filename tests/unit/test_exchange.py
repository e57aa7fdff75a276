"""The exchange: what sites say from any thread becomes one decision, and nothing said is lost."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.exchange import Exchange, Gathered, Terms
from orchestrator.ledger import ContributionRow, PlanRow, RoundRow
from orchestrator.sessions import Session, Sessions
from protos.v1 import site_pb2
from tests.support.workbench import Workbench

WAIT_S = 20.0
HOUR = 3600.0


class Inbox:
    """An exchange's queue that tells when all of it was heard."""

    def __init__(self, exchange: Exchange) -> None:
        self.idle = threading.Event()
        self._inner = getattr(exchange._inbox, "_inner", exchange._inbox)
        exchange._inbox = self  # type: ignore[assignment]

    def put(self, event: Any) -> None:
        self.idle.clear()
        self._inner.put(event)

    def get(self, timeout: float) -> Any:
        if self._inner.empty():
            self.idle.set()
        return self._inner.get(timeout=timeout)


class Table:
    """Three sites, one of them not here, and a round that waits for them."""

    def __init__(self, bench: Workbench) -> None:
        self.bench, self.exchange = bench, bench.engine.exchange
        self.sessions = Sessions(HOUR, self.exchange.attached, self.exchange.gone)
        self.exchange.sessions = self.sessions
        self.session = {name: self.attach(name) for name in ("north", "south")}
        bench.run("r")
        bench.commit("r", 0)
        self.rows = [
            PlanRow("r", 1, 1, "train", s, b"plan " + s.encode(), s * 8)
            for s in ("east", "north", "south")
        ]
        bench.ledger.plan_round(RoundRow("r", 1, 1, quorum=2), self.rows)
        bench.board.begin("r", 1, 1, [row.site for row in self.rows])
        self.plan_id = self.rows[0].id
        self.patience_s, self.leads = 0.0, dict[str, float]()
        self._done: list[Gathered] = []

    def attach(self, site: str) -> Session:
        session = Session(site, "f", site_pb2.Hello())
        self.sessions.attach(session)
        return session

    def gather(
        self, quorum: int = 2, seconds: float = HOUR, base: site_pb2.SmallModel | None = None
    ) -> threading.Thread:
        """Gather in a thread, as the runner does; returns once it waits."""
        self.inbox = Inbox(self.exchange)

        def run() -> None:
            terms = Terms(quorum, seconds, self.patience_s, self.leads)
            self._done.append(self.exchange.gather(self.rows, terms, base))
            self.inbox.idle.set()

        thread = threading.Thread(target=run)
        thread.start()
        assert self.inbox.idle.wait(WAIT_S)
        return thread

    def still_waits(self, thread: threading.Thread) -> bool:
        """Whether it waits on, with everything that was said heard."""
        assert self.inbox.idle.wait(WAIT_S)
        return not self._done

    def result(self, thread: threading.Thread) -> Gathered:
        thread.join(WAIT_S)
        assert not thread.is_alive(), "still gathering"
        return self._done.pop()

    def count(self, site: str) -> None:
        """What the service does: the ledger first, then the news."""
        row = ContributionRow(
            f"c-{site}", self.plan_id, "r", 1, 1, "train", site, site * 8, b"", b"", "f", "i", "m",
            1, None, 0.0,
        )  # fmt: skip
        assert self.bench.ledger.accept(row).verdict == "counted"
        self.exchange.counted(site, self.plan_id, row.digest)

    def told(self, site: str) -> list[str]:
        """What a site was sent so far."""
        session = self.session[site]
        session.end()
        return [str(m.WhichOneof("kind")) for m in session.outgoing()]

    def states(self) -> dict[str, str]:
        return {row.site: row.state for row in self.bench.board.rows()}


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    bench = Workbench(tmp_path)
    table = Table(bench)
    yield table
    table.sessions.drain("the end")
    bench.close()


def test_plans_are_pushed_to_who_is_here(table: Table) -> None:
    thread = table.gather()
    assert table.states() == {"east": "gone", "north": "asked", "south": "asked"}
    table.exchange.interrupt()
    assert table.result(thread).interrupted
    assert table.told("north") == ["plan"]


def test_a_small_base_goes_out_with_the_plans_and_is_counted(table: Table) -> None:
    thread = table.gather(base=site_pb2.SmallModel(data=b"weights"))
    table.exchange.interrupt()
    assert table.result(thread).interrupted
    session = table.session["north"]
    session.end()
    (said,) = session.outgoing()
    assert said.plan.plan == b"plan north"
    assert said.plan.base.data == b"weights"
    received = {row.site: row.received_bytes for row in table.bench.board.rows()}
    assert received == {"east": 0, "north": 7, "south": 7}  # east is not there


def test_a_small_base_goes_out_once_to_a_site_that_stays(table: Table) -> None:
    """A candidate that was assessed is the next base; a site that came anew has lost it, maybe."""
    bases = [
        site_pb2.SmallModel(head=site_pb2.ArtefactHead(index=name), data=name)
        for name in (b"1", b"2")
    ]
    for base in (bases[0], bases[0], bases[1], bases[0]):
        thread = table.gather(base=base)
        table.exchange.interrupt()
        assert table.result(thread).interrupted
    again = table.attach("south")
    thread = table.gather(base=bases[0])
    table.exchange.interrupt()
    assert table.result(thread).interrupted
    given = {}
    for name, session in (("north", table.session["north"]), ("south again", again)):
        session.end()
        given[name] = [said.plan.base.data for said in session.outgoing()]
    assert given == {"north": [b"1", b"", b"2", b"1", b""], "south again": [b"1"]}
    received = {row.site: row.received_bytes for row in table.bench.board.rows()}
    assert received["north"] == 3


def test_it_closes_when_all_have_answered(table: Table) -> None:
    thread = table.gather()
    for site in ("north", "south"):
        table.count(site)
    table.exchange.failed("east", table.plan_id, "TaskFailed", "killed by SIGKILL", "failed")
    found = table.result(thread)
    assert found.decision.kind == "close"
    assert found.counted == ("north", "south")
    assert found.missing == {"east": "killed by SIGKILL"}
    assert table.states() == {"east": "failed", "north": "counted", "south": "counted"}
    assert table.bench.notes == ["killed by SIGKILL"]


def test_it_is_given_up_when_the_quorum_is_out_of_reach(table: Table) -> None:
    thread = table.gather()
    for site in ("north", "south"):
        table.exchange.failed(site, table.plan_id, "ContributionRefused", "NaN in w", "refused")
    found = table.result(thread)
    assert (found.decision.kind, found.interrupted) == ("abandon", False)
    assert "north: NaN in w" in found.decision.reason
    assert table.states()["north"] == "refused"


def test_the_quorum_and_the_grace_close_it_without_who_is_gone(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table.exchange, "_grace_s", 0.0)
    thread = table.gather()
    table.count("north")
    assert table.still_waits(thread)
    table.count("south")
    assert table.result(thread).missing == {"east": "gone"}


def test_who_comes_back_is_waited_for(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.exchange, "_grace_s", 0.0)
    thread = table.gather()
    table.attach("east")
    table.count("north")
    table.count("south")
    assert table.still_waits(thread)
    table.count("east")
    assert table.result(thread).counted == ("east", "north", "south")


def test_the_deadline_ends_it(table: Table) -> None:
    for site in ("north", "south"):
        table.count(site)
    found = table.result(table.gather(seconds=0.0))
    assert found.decision.kind == "close"
    assert found.counted == ("north", "south")


def test_who_did_not_answer_is_explained(table: Table) -> None:
    table.count("north")
    table.bench.board.progress("south", "training", 3.0, 9.0, "steps", None, None, None)
    table.exchange.troubled("east", "site east: two agents use its certificate")
    found = table.result(table.gather(seconds=0.0))
    why = "site east: two agents use its certificate"
    assert found.missing["east"] == f"gone: {why}"
    start = "did not answer in time: training, 3 of 9 steps, no progress for "
    assert found.missing["south"].startswith(start)
    assert why in found.decision.reason
    assert start in found.decision.reason
    table.exchange.counted("east", table.plan_id, "digest")
    assert table.exchange.troubles.of("east", attached=True) == ""


def test_what_was_answered_before_it_began_is_in_the_ledger(table: Table) -> None:
    """After a restart, and for work that an earlier attempt had finished."""
    table.count("north")
    table.bench.ledger.answer_plan(table.plan_id, "south", "failed", "TaskFailed", "died")
    table.attach("east")
    thread = table.gather(quorum=1)
    table.count("east")
    found = table.result(thread)
    assert found.counted == ("east", "north")
    assert found.missing == {"south": "died"}
    assert table.told("north") == []


def test_news_of_another_plan_change_nothing(table: Table) -> None:
    thread = table.gather()
    for other in ("r/1/2/train", "r/2/1/train", "", "s/1/1/train"):
        for site in ("north", "south", "east"):
            table.exchange.counted(site, other, "c")
            table.exchange.failed(site, other, "E", "no", "failed")
    assert table.still_waits(thread)
    table.exchange.interrupt()
    assert table.result(thread).counted == ()
    assert table.states() == {"east": "gone", "north": "asked", "south": "asked"}


def test_news_that_the_exchange_before_did_not_wait_for_change_nothing(table: Table) -> None:
    table.exchange._plan_id = "r/0/1/train"  # as while it was under way
    table.exchange.failed("north", "r/0/1/train", "E", "no", "failed")
    table.exchange.counted("south", "r/0/1/train", "c")
    thread = table.gather(quorum=3)
    assert table.still_waits(thread)
    table.exchange.interrupt()
    found = table.result(thread)
    assert found.counted == ()
    assert found.missing["north"].startswith("did not answer in time")


def test_who_asks_to_end_is_heard_even_before_it_begins(table: Table) -> None:
    """The daemon may be told to stop while the round is being planned."""
    table.exchange.interrupt()
    found = table.result(table.gather())
    assert found.interrupted
    # Once: what goes on afterwards waits again.
    thread = table.gather()
    assert table.still_waits(thread)
    table.exchange.interrupt()
    assert table.result(thread).interrupted


def test_an_answer_is_stronger_than_an_interruption(table: Table) -> None:
    for row in table.rows:
        table.bench.ledger.answer_plan(row.id, row.site, "failed", "E", "died")
    table.exchange.interrupt()
    assert not table.result(table.gather()).interrupted


def test_a_site_that_leaves_the_run_is_not_waited_for(table: Table) -> None:
    thread = table.gather(quorum=1)
    table.count("north")
    table.exchange.failed("east", table.plan_id, "E", "died", "failed")
    table.exchange.left_run("south", "other run")
    assert table.still_waits(thread)
    table.exchange.left_run("south", "r")
    found = table.result(thread)
    assert found.missing == {"east": "died", "south": "the site left the run"}
    assert ("r", "south") in table.exchange.left
    row = table.bench.ledger.plan(table.plan_id, "south")
    assert row is not None
    assert row.answer == "left"


def test_progress_is_shown_of_the_plan_under_way_only(table: Table) -> None:
    thread = table.gather()
    said = site_pb2.Progress(done=1, planned=2, unit="epochs", loss=float("nan"), learning_rate=0.1)
    table.exchange.progress("north", "other", "training", said)
    assert table.states()["north"] == "asked"
    table.exchange.progress("north", table.plan_id, "training", said)
    row = next(r for r in table.bench.board.rows() if r.site == "north")
    assert (row.state, row.done, row.planned, row.loss) == ("training", 1.0, 2.0, None)
    table.exchange.interrupt()
    table.result(thread)


def test_who_is_missing_is_told_that_it_is_over(table: Table) -> None:
    table.exchange.cancel(table.rows, ["south", "east"], "the round was closed")
    assert table.told("north") == []
    assert table.told("south") == ["cancel"]


def finish_of(table: Table, site: str) -> list[str]:
    """The plans that a site was told to finish."""
    session = table.session[site]
    session.end()
    return [m.finish.plan_id for m in session.outgoing() if m.WhichOneof("kind") == "finish"]


def test_sites_are_told_to_finish_and_again_when_they_come_back(table: Table) -> None:
    table.leads = dict.fromkeys(("east", "north", "south"), 2 * HOUR)  # at once
    thread = table.gather(quorum=3)
    south, table.session["south"] = table.session["south"], table.attach("south")
    assert table.still_waits(thread)
    table.count("north")
    table.exchange.interrupt()
    table.result(thread)
    south.end()
    told = [m.finish.plan_id for m in south.outgoing() if m.WhichOneof("kind") == "finish"]
    for plans in (told, finish_of(table, "south"), finish_of(table, "north")):
        assert set(plans) == {table.plan_id}
    assert "site north is asked for what it has done: the deadline is near" in table.bench.notes


def test_nobody_is_told_to_finish_where_partial_work_is_not_taken(table: Table) -> None:
    thread = table.gather(seconds=0.0)
    table.result(thread)
    assert finish_of(table, "north") == []


def test_a_site_that_prepares_is_waited_for_behind_the_deadline(table: Table) -> None:
    table.patience_s = HOUR
    for site in ("east", "north"):
        table.count(site)
    table.exchange._plan_id = table.plan_id
    thread = table.gather(seconds=0.5)
    said = site_pb2.Progress(plan_id=table.plan_id, loss=float("nan"), prepared_s=100.0)
    table.exchange.progress("south", table.plan_id, "preparing", said)
    table.exchange.progress("south", table.plan_id, "training", said)
    thread.join(1.0)
    assert table.still_waits(thread)
    table.count("south")
    assert table.result(thread).decision.reason == "every site answered"


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_what_a_site_says_of_its_preparing_is_bounded(table: Table, seconds: float) -> None:
    for site in ("east", "north"):
        table.count(site)
    table.patience_s = 0.2
    thread = table.gather(seconds=0.1)
    said = site_pb2.Progress(plan_id=table.plan_id, loss=float("nan"), prepared_s=seconds)
    table.exchange.progress("south", table.plan_id, "training", said)
    assert table.result(thread).decision.kind == "close"
