"""The ledger: every method one transaction, answers are final, what is committed stays."""

import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from orchestrator.ledger import (
    ContributionRow,
    Ledger,
    PlanKind,
    PlanRow,
    RoundRow,
    RunRow,
    database,
    tables,
)
from orchestrator.store import Store
from protos.digest import digest
from protos.errors import (
    ConfigInvalid,
    Conflict,
    DataCorrupt,
    InvalidInput,
    NotEnrolled,
    NotFound,
    TokenUsed,
    Unavailable,
)

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("empty") / "ledger.sqlite"
    Ledger.open(path).close()
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ledger(empty: Path, tmp_path: Path, clock: Clock) -> Iterator[Ledger]:
    shutil.copy(empty, tmp_path / "ledger.sqlite")
    ledger = Ledger.open(tmp_path / "ledger.sqlite", clock)
    yield ledger
    ledger.close()


def work(site: str, name: str = "work") -> str:
    return digest(f"{site} {name}".encode())


def plan(
    attempt: int = 1,
    site: str = "north",
    kind: PlanKind = "train",
    run: str = "r1",
    round: int = 1,
    name: str = "work",
) -> PlanRow:
    row = PlanRow(run, round, attempt, kind, site, b"", work(site, name))
    return replace(row, plan=f"{row.id} for {site}: {name}".encode())


def contribution(of: PlanRow, text: str = "") -> ContributionRow:
    header = f"{of.id} {of.site} {text}".encode()
    return ContributionRow(
        digest=digest(header),
        plan_id=of.id,
        run=of.run,
        round=of.round,
        attempt=of.attempt,
        kind=of.kind,
        site=of.site,
        work_digest=of.work_digest,
        header=header,
        signature=b"signed",
        fingerprint="f" * 64,
        index=digest(b"index" + header),
        manifest=digest(b"manifest"),
        nbytes=1 << 40,
        norm=1.5,
        received=1000.0,
    )


def run_row(run: str = "r1", name: str = "fashion", **more: Any) -> RunRow:
    config = {"name": name, "cohort": {"sites": ["north", "south"]}}
    more = {"created": 1000.0, **more}
    return RunRow(run, name, config, digest(name.encode()), rounds=3, **more)


def begin(ledger: Ledger, attempt: int = 1, round: int = 1, **more: Any) -> list[PlanRow]:
    """A planned round of two sites; the run is made with the first one."""
    run = more.pop("run", "r1")
    if run not in {row.id for row in ledger.runs()}:
        ledger.create_run(run_row(run, f"name of {run}"))
    plans = [plan(attempt, site, round=round, run=run) for site in ("south", "north")]
    row = RoundRow(run, round, attempt, base=digest(b"base"), quorum=2, started=1000.0)
    ledger.plan_round(row, plans, **more)
    return plans


def finish(ledger: Ledger, round: int = 1, run: str = "r1", attempt: int = 1) -> list[str]:
    """A whole round: both sites count, closed, committed. Digests of what was closed in."""
    for one in begin(ledger, attempt, round, run=run):
        assert ledger.accept(contribution(one)).verdict == "counted"
    closed = ledger.close_round(run, round, attempt, None, "all answered").closed_set
    ledger.commit_round(run, round, attempt, model=digest(f"model {run} {round}".encode()))
    return list(closed)


# ------------------------------------------------------------------------------------ the file


def test_meta(ledger: Ledger) -> None:
    assert ledger.get_meta("federation") is None
    ledger.set_meta("federation", "plains")
    ledger.set_meta("federation", "hills")
    assert ledger.get_meta("federation") == "hills"


def test_the_connection_is_durable_and_checks_references(ledger: Ledger) -> None:
    with ledger._reading() as db:
        found = {
            pragma: db.exec_driver_sql(f"PRAGMA {pragma}").scalar()
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert found == {
        "journal_mode": "wal",
        "synchronous": 2,
        "foreign_keys": 1,
        "busy_timeout": 5000,
    }


def test_the_migrations_make_the_tables(ledger: Ledger) -> None:
    with ledger._reading() as db:
        context = MigrationContext.configure(db, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        assert context.get_current_revision() == database.HEAD
        names = {index["name"] for index in sa.inspect(db).get_indexes("rounds")}
    assert {"uq_rounds_committed", "uq_rounds_under_way"} <= names


def test_a_newer_ledger_is_left_alone(tmp_path: Path, empty: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    shutil.copy(empty, path)
    db = sqlite3.connect(path)
    db.execute("UPDATE alembic_version SET version_num = '9999'")
    db.commit()
    db.close()
    with pytest.raises(Conflict, match="a newer version of Farflung wrote this ledger"):
        Ledger.open(path)


def read_all(path: Path) -> None:
    with closing(Ledger.open(path)) as ledger:
        ledger.runs()
        ledger.sites()
        ledger.open_rounds()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, None])
def test_a_damaged_ledger_says_so(tmp_path: Path, empty: Path, content: bytes | None) -> None:
    path = tmp_path / "ledger.sqlite"
    data = bytearray(empty.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)  # all but the page of the schema
    path.write_bytes(bytes(data) if content is None else content)
    with pytest.raises(DataCorrupt, match=r"is damaged or is not a ledger.*backup"):
        read_all(path)


def test_a_ledger_that_another_process_holds_says_so(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.1)
    other = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    mine = Ledger.open(tmp_path / "ledger.sqlite")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Unavailable, match="another process is writing"):
        mine.set_meta("key", "value")
    assert mine.runs() == [], "reading waits for nobody"
    other.execute("ROLLBACK")
    mine.set_meta("key", "value")
    other.close()
    mine.close()


def test_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="can't be opened"):
        Ledger.open(tmp_path / "no" / "ledger.sqlite")


def test_a_driver_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigInvalid, match="needs the Python package psycopg"):
        Ledger.open("postgresql://somewhere/ledger")


def test_many_threads_write(ledger: Ledger) -> None:
    ledger.create_run(run_row())
    sites = [f"site-{n}" for n in range(16)]
    ledger.plan_round(RoundRow("r1", 1, 1, started=1.0), [plan(1, site) for site in sites])
    verdicts = []

    def send(site: str) -> None:
        verdicts.append(ledger.accept(contribution(plan(1, site))).again)

    threads = [threading.Thread(target=send, args=(site,)) for site in sites * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (verdicts.count(False), verdicts.count(True)) == (16, 32)
    assert len(ledger.contributions("r1", 1, 1)) == 16
    ledger.verify_entries("r1")


class Queue(deque[Any]):
    """A queue that says when something was put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.put = threading.Semaphore(0)

    def append(self, item: Any) -> None:
        super().append(item)
        self.put.release()


@pytest.mark.parametrize("stranger", [False, True])
def test_what_waits_is_written_together_and_what_fails_spoils_no_other(
    ledger: Ledger, stranger: bool
) -> None:
    ledger.create_run(run_row())
    sites = ["east", "north", "south"]
    ledger.plan_round(RoundRow("r1", 1, 1, started=1.0), [plan(1, site) for site in sites])
    waiting = ledger._waiting = Queue()
    commits: list[object] = []
    sa.event.listen(ledger._engine, "commit", commits.append)
    outcomes: dict[str, object] = {}

    def send(site: str) -> None:
        try:
            outcomes[site] = ledger.accept(contribution(plan(1, site))).verdict
        except NotFound:
            outcomes[site] = "not found"

    senders = [*sites, "west"] if stranger else sites
    threads = [threading.Thread(target=send, args=(site,)) for site in senders]
    with ledger._writer:  # somebody is writing
        for thread in threads:
            thread.start()
        for _ in senders:
            assert waiting.put.acquire(timeout=30)
    for thread in threads:
        thread.join()
    assert {site: outcomes.pop(site) for site in sites} == dict.fromkeys(sites, "counted")
    assert outcomes == ({"west": "not found"} if stranger else {})
    assert len(commits) == (3 if stranger else 1)
    assert [c.site for c in ledger.contributions("r1", 1, 1)] == sites
    ledger.verify_entries("r1")


# --------------------------------------------------------------------------------------- sites


def enrol(ledger: Ledger, site: str = "north", number: int = 1) -> str:
    ledger.invite(site, f"{site} token {number}", expires=2000.0)
    fingerprint = digest(f"{site} {number}".encode())
    name = ledger.use_token(
        f"{site} token {number}", fingerprint=fingerprint, certificate_pem=b"pem", expires=9000.0
    )
    assert name == site
    return fingerprint


def test_a_site_is_invited_and_enrols_once(ledger: Ledger, clock: Clock) -> None:
    ledger.invite("north", "t1", expires=2000.0)
    assert ledger.site("north").state == "invited"
    token = ledger.token("t1")
    assert token is not None
    assert (token.site, token.used) == ("north", None)
    with pytest.raises(TokenUsed, match="is for site north, not south"):
        ledger.use_token("t1", fingerprint="a", certificate_pem=b"", expires=1.0, site="south")
    ledger.use_token("t1", fingerprint="a", certificate_pem=b"pem", expires=9000.0, site="north")
    assert ledger.allowed("a") == "north"
    with pytest.raises(TokenUsed, match=r"used before.*farflung invite north"):
        ledger.use_token("t1", fingerprint="b", certificate_pem=b"pem", expires=9000.0)
    assert ledger.allowed("b") is None
    row = ledger.site("north")
    assert (row.state, row.fingerprint, row.certificate_expires) == ("enrolled", "a", 9000.0)
    used, certificate = ledger.token("t1"), ledger.certificate("a")
    assert used is not None
    assert (used.used, used.fingerprint) == (clock.now, "a")
    assert certificate is not None
    assert certificate.pem == b"pem"
    assert ledger.token("t2") is None
    assert ledger.certificate("b") is None


def test_tokens_expire_and_are_taken_back(ledger: Ledger, clock: Clock) -> None:
    ledger.invite("north", "t1", expires=2000.0)
    ledger.invite("north", "t2", expires=2000.0)
    with pytest.raises(TokenUsed, match="taken back"):
        ledger.use_token("t1", fingerprint="a", certificate_pem=b"", expires=9000.0)
    with pytest.raises(TokenUsed, match="not one of this federation"):
        ledger.use_token("t9", fingerprint="a", certificate_pem=b"", expires=9000.0)
    with pytest.raises(Conflict):
        ledger.invite("south", "t2", expires=2000.0)
    clock.now = 2000.0
    with pytest.raises(TokenUsed, match="expired"):
        ledger.use_token("t2", fingerprint="a", certificate_pem=b"", expires=9000.0)
    assert ledger.sites()[0].state == "invited"


def test_a_renewed_certificate_lets_the_old_one_run_out(ledger: Ledger, clock: Clock) -> None:
    first = enrol(ledger)
    for _ in range(2):
        ledger.renew("north", first, "second", b"pem", 20_000.0)
    assert ledger.allowed(first) == ledger.allowed("second") == "north"
    assert ledger.site("north").fingerprint == "second"
    clock.now = 9000.0
    assert ledger.allowed(first) is None
    assert ledger.allowed("second") == "north"
    for site, old in (("north", first), ("south", "second"), ("north", "unknown")):
        with pytest.raises(NotEnrolled):
            ledger.renew(site, old, "third", b"pem", 30_000.0)


def test_a_revoked_site_is_out_until_it_is_invited_again(ledger: Ledger) -> None:
    first = enrol(ledger)
    ledger.renew("north", first, "second", b"pem", 20_000.0)
    ledger.invite("north", "unused", expires=2000.0)
    ledger.revoke("north")
    assert ledger.site("north").state == "revoked"
    assert ledger.allowed(first) is ledger.allowed("second") is None
    with pytest.raises(NotEnrolled):
        ledger.renew("north", "second", "third", b"pem", 30_000.0)
    with pytest.raises(TokenUsed):
        ledger.use_token("unused", fingerprint="x", certificate_pem=b"", expires=9000.0)
    again = enrol(ledger, number=2)
    assert ledger.allowed(again) == "north"
    assert ledger.allowed(first) is ledger.allowed("second") is None


def test_enrolling_again_shuts_the_machine_before_out(ledger: Ledger) -> None:
    first, second = enrol(ledger, number=1), enrol(ledger, number=2)
    assert (ledger.allowed(first), ledger.allowed(second)) == (None, "north")


def test_unknown_sites_get_a_hint(ledger: Ledger) -> None:
    with pytest.raises(NotFound, match="no site yet"):
        ledger.site("north")
    enrol(ledger)
    with pytest.raises(NotFound, match="Did you mean north"):
        ledger.site("nort")
    with pytest.raises(NotFound, match="There are: north"):
        ledger.revoke("zz")


# ---------------------------------------------------------------------------------------- runs


def test_runs_come_back_as_they_were(ledger: Ledger) -> None:
    row = run_row(state="queued", model="m" * 64)
    ledger.create_run(row)
    assert ledger.run("r1") == ledger.run("fashion") == row
    child = run_row("r2", "child", parent=("r1", 2), created=1001.0)
    ledger.create_run(child)
    assert ledger.run("child").parent == ("r1", 2)
    assert [one.id for one in ledger.runs()] == ["r1", "r2"]
    with pytest.raises(NotFound, match="Did you mean fashion"):
        ledger.run("fashio")
    with pytest.raises(NotFound):
        ledger.create_run(run_row("r3", "orphan", parent=("r9", 1)))


@pytest.mark.parametrize(
    ("run", "name"), [("r2", "fashion"), ("r1", "x"), ("r2", "r1"), ("fashion", "x")]
)
def test_names_of_runs_are_unique(ledger: Ledger, run: str, name: str) -> None:
    ledger.create_run(run_row())
    with pytest.raises(Conflict, match="Give the new one another name"):
        ledger.create_run(run_row(run, name))


def test_the_queue(ledger: Ledger) -> None:
    assert ledger.next_queued() is None
    ledger.create_run(run_row("r2", "b", created=2.0))
    ledger.create_run(run_row("r1", "a", created=1.0))
    first = ledger.next_queued()
    assert first is not None
    assert first.id == "r1"
    row = ledger.set_run("r1", state="running", started=5.0, expect=["queued"])
    assert (row.state, row.started) == ("running", 5.0)
    assert ledger.running() == row
    with pytest.raises(Conflict, match="it is running, and has to be queued"):
        ledger.set_run("r1", state="running", expect=["queued"])
    second = ledger.next_queued()
    assert second is not None
    assert second.id == "r2"
    row = ledger.set_run("r1", state="paused", reason="below\0 quorum", ended=7.0)
    assert (row.reason, row.ended) == ("below quorum", 7.0)
    row = ledger.set_run("r1", state="queued", reason="")
    assert (row.reason, row.ended, row.started) == ("", None, 5.0)


def test_a_run_gets_more_rounds_never_fewer(ledger: Ledger) -> None:
    ledger.create_run(run_row())
    assert ledger.extend_run("r1", 5).rounds == 5
    for rounds in (5, 1):
        with pytest.raises(Conflict, match="has 5 rounds"):
            ledger.extend_run("r1", rounds)


def test_the_first_base_is_set_before_any_round(ledger: Ledger) -> None:
    ledger.create_run(run_row())
    assert ledger.set_run("r1", model="base").model == "base"
    finish(ledger)
    with pytest.raises(Conflict, match="comes from its committed rounds"):
        ledger.set_run("r1", model="other")


# -------------------------------------------------------------------------------------- rounds


def test_a_round_from_plan_to_commit(ledger: Ledger, clock: Clock) -> None:
    plans = begin(ledger)
    assert ledger.open_plans("north") == [plans[1]]
    assert ledger.plan(plans[0].id, "south") == plans[0]
    for one in plans:
        assert ledger.accept(contribution(one)).plan_id == one.id
    assert ledger.open_plans("north") == []
    clock.now = 1010.0
    closed = ledger.close_round("r1", 1, 1, None, "all answered")
    assert (closed.state, closed.closed, closed.reason) == ("closed", 1010.0, "all answered")
    assert closed.closed_set == tuple(contribution(one).digest for one in reversed(plans))
    memos, summary = {"co_learning": {"epochs": 5, "delta": float("inf")}}, {"scores": {"a": 0.5}}
    done = ledger.commit_round(
        "r1", 1, 1, model="m" * 64, outer_state="o" * 64, memos=memos, summary=summary
    )
    assert (done.state, done.memos, done.summary) == ("committed", memos, summary)
    assert ledger.history("r1") == [done] == ledger.rounds("r1")
    assert ledger.last_committed("r1") == done == ledger.round("name of r1", 1)
    run = ledger.run("r1")
    assert (run.model, run.outer_state) == ("m" * 64, "o" * 64)
    assert ledger.open_rounds() == []


@pytest.mark.parametrize("end", ["committed", "abandoned"])
def test_what_has_ended_does_not_change(ledger: Ledger, end: str) -> None:
    begin(ledger)
    if end == "committed":
        ledger.close_round("r1", 1, 1, [], "deadline")
        ledger.commit_round("r1", 1, 1, model="m")
    else:
        ledger.abandon_round("r1", 1, 1, "below quorum")
    before, run, chain = ledger.round("r1", 1), ledger.run("r1"), ledger.entries("r1")
    for change in (
        lambda: ledger.close_round("r1", 1, 1, None, "x"),
        lambda: ledger.hold_round("r1", 1, 1, "x"),
        lambda: ledger.abandon_round("r1", 1, 1, "x"),
        lambda: ledger.commit_round("r1", 1, 1, model="other"),
        lambda: ledger.extend_deadline("r1", 1, 1, 5.0),
        lambda: ledger.open_exchange("r1", 1, 1, "assess", [plan(kind="assess")]),
        lambda: ledger.add_plans([plan(site="east")]),
        lambda: begin(ledger),
    ):
        with pytest.raises(Conflict):
            change()
    assert (ledger.round("r1", 1), ledger.run("r1"), ledger.entries("r1")) == (before, run, chain)


def test_a_held_round_keeps_its_candidate(ledger: Ledger) -> None:
    begin(ledger)
    with pytest.raises(Conflict, match="it is planned, and has to be closed to be held"):
        ledger.hold_round("r1", 1, 1, "gate")
    ledger.close_round("r1", 1, 1, None, "deadline")
    held = ledger.hold_round(
        "r1", 1, 1, "gate", model="m", outer_state="o", memos={"a": 1}, summary={"b": 2}
    )
    assert (held.state, held.reason, held.model) == ("held", "gate", "m")
    assert ledger.run("r1").model == ""
    assert ledger.open_rounds() == [held]
    done = ledger.commit_round("r1", 1, 1, model=held.model)
    assert (done.outer_state, done.memos, done.summary) == ("o", {"a": 1}, {"b": 2})
    assert ledger.run("r1").outer_state == "o"


def test_one_attempt_at_a_time(ledger: Ledger) -> None:
    begin(ledger)
    for attempt, round in ((1, 1), (2, 1), (1, 2)):
        with pytest.raises(Conflict, match="end it before planning another"):
            begin(ledger, attempt, round)
    ledger.abandon_round("r1", 1, 1, "below quorum")
    with pytest.raises(Conflict, match="there was attempt 1 before"):
        begin(ledger, 1)
    begin(ledger, 2)
    begin(ledger, 3, abandoning="site north is gone")
    assert [(one.attempt, one.state) for one in ledger.rounds("r1", all_attempts=True)] == [
        (1, "abandoned"), (2, "abandoned"), (3, "planned"),
    ]  # fmt: skip
    assert [one.attempt for one in ledger.rounds("r1")] == [3]
    assert ledger.round("r1", 1, 2).reason == "site north is gone"
    with pytest.raises(NotFound, match="no round 1, attempt 7"):
        ledger.round("r1", 1, 7)
    with pytest.raises(NotFound):
        ledger.rounds("r9")


def test_the_database_itself_refuses_a_second_commit(ledger: Ledger) -> None:
    finish(ledger)
    with ledger._reading() as db:
        values = dict(db.execute(sa.select(tables.rounds)).one()._mapping)
    values["attempt"] = 2
    with pytest.raises(Conflict), ledger._writing() as db:
        db.execute(sa.insert(tables.rounds).values(values))


def test_the_closed_set_can_be_chosen_among_the_counted(ledger: Ledger) -> None:
    south, north = begin(ledger)
    for one in (south, north):
        ledger.accept(contribution(one))
    with pytest.raises(Conflict, match="does not count for it"):
        ledger.close_round("r1", 1, 1, ["0" * 64], "x")
    assert ledger.round("r1", 1).state == "planned"
    assert ledger.exchange_open("r1", 1, 1, "train"), "what raises changes nothing"
    chosen = contribution(south).digest
    assert ledger.close_round("r1", 1, 1, [chosen], "x").closed_set == (chosen,)


def test_deadlines_move_with_time_that_does_not_count(ledger: Ledger) -> None:
    begin(ledger)
    ledger.extend_deadline("r1", 1, 1, 10.0)
    assert ledger.extend_deadline("r1", 1, 1, 5.5).deadline_s == 3615.5
    with pytest.raises(NotFound):
        ledger.extend_deadline("r1", 2, 1, 5.5)


def test_plans_belong_to_what_they_are_planned_with(ledger: Ledger) -> None:
    ledger.create_run(run_row())
    with pytest.raises(InvalidInput):
        ledger.plan_round(RoundRow("r1", 1, 1), [plan(attempt=2)])
    with pytest.raises(InvalidInput):
        ledger.plan_round(RoundRow("r1", 1, 1, state="closed"))
    with pytest.raises(NotFound):
        ledger.plan_round(RoundRow("r9", 1, 1))
    assert ledger.rounds("r1") == []


def test_a_site_that_joins_late_is_asked_too(ledger: Ledger) -> None:
    begin(ledger)
    east = plan(site="east")
    ledger.add_plans([east])
    ledger.add_plans([east])
    with pytest.raises(Conflict, match="other work"):
        ledger.add_plans([plan(site="east", name="other")])
    assert ledger.open_plans("east") == [east]
    assert [one.site for one in ledger.plans("r1", 1, 1)] == ["east", "north", "south"]


# ------------------------------------------------------------------------------- contributions


def test_a_contribution_counts_once(ledger: Ledger) -> None:
    _, north = begin(ledger)
    row = contribution(north)
    first = ledger.accept(row)
    assert (first.verdict, first.again) == ("counted", False)
    again = ledger.accept(row)
    assert (again.verdict, again.again, again.plan_id) == ("counted", True, north.id)
    other = ledger.accept(contribution(north, "another"))
    assert other.verdict == "refused"
    assert "has its answer: counted" in other.reason
    assert ledger.contributions("r1", 1, 1) == [row] == ledger.contributions("r1", 1, 1, "train")
    assert ledger.contribution(row.digest) == row
    answered = ledger.plan(north.id, "north")
    assert answered is not None
    assert (answered.answer, answered.contribution) == ("counted", row.digest)
    thief = ledger.accept(replace(row, site="south"))
    assert (thief.verdict, thief.reason) == ("refused", "the contribution is another site's")


def test_a_late_contribution_is_recorded_without_its_payload(ledger: Ledger) -> None:
    south, north = begin(ledger)
    ledger.accept(contribution(south))
    ledger.close_round("r1", 1, 1, None, "deadline")
    late = contribution(north)
    for again in (False, True):
        answer = ledger.accept(late)
        assert (answer.verdict, answer.again) == ("late", again)
        assert ledger.accept(contribution(south)).verdict == "counted"
    kept = ledger.contribution(late.digest)
    assert kept == replace(late, verdict="late", header=b"", signature=b"")
    assert ledger.contributions("r1", 1, 1) == [contribution(south)]
    assert ledger.accept(contribution(south, "second")).verdict == "refused"
    row = ledger.plan(north.id, "north")
    assert row is not None
    assert row.answer == "late"
    ledger.abandon_round("r1", 1, 1, "x")
    begin(ledger, 2)
    assert ledger.accept(late).verdict == "late", "an answer is final"
    assert ledger.carry_over("r1", 1, 2) == [contribution(south)], "late is late for ever"


def test_contributions_without_a_plan(ledger: Ledger) -> None:
    _, north = begin(ledger)
    for plan_id in (
        "r1/1/1/assess",
        "r1/1/2/train",
        "nonsense",
        "r1/x/1/train",
        f"r1/{'9' * 40}/1/train",
    ):
        with pytest.raises(NotFound, match="site north has no plan"):
            ledger.accept(replace(contribution(north), plan_id=plan_id))
    with pytest.raises(NotFound, match="site east"):
        ledger.accept(replace(contribution(north), site="east"))
    answer = ledger.accept(replace(contribution(north), work_digest=work("north", "other")))
    assert (answer.verdict, answer.reason) == ("refused", f"plan {north.id} asks for other work")
    with pytest.raises(NotFound):
        ledger.contribution("0" * 64)


def test_answers_without_a_contribution(ledger: Ledger) -> None:
    south, north = begin(ledger)
    row = ledger.answer_plan(north.id, "north", "failed", "TaskFailed", "out of\0 memory")
    assert (row.answer, row.error, row.message) == ("failed", "TaskFailed", "out of memory")
    assert ledger.answer_plan(north.id, "north", "left").answer == "failed"
    assert ledger.open_plans("north") == []
    assert ledger.accept(contribution(north)).verdict == "counted", "it came after all"
    ledger.answer_plan(south.id, "south", "refused", "ContributionRefused", "NaN in weight")
    assert ledger.accept(contribution(south)).verdict == "refused"
    with pytest.raises(InvalidInput):
        ledger.answer_plan(south.id, "south", "counted")
    with pytest.raises(NotFound):
        ledger.answer_plan(south.id, "east", "failed")


def test_finished_work_counts_in_the_next_attempt(ledger: Ledger) -> None:
    south, north = begin(ledger)
    done = contribution(south)
    ledger.accept(done)
    ledger.abandon_round("r1", 1, 1, "below quorum")
    _, north2 = begin(ledger, 2)
    assert ledger.carry_over("r1", 1, 2) == [done]
    assert ledger.carry_over("r1", 1, 2) == []
    assert ledger.open_plans("south") == []
    # north finished the work of the first attempt after the second one had begun
    answer = ledger.accept(contribution(north))
    assert (answer.verdict, answer.plan_id) == ("counted", north2.id)
    assert ledger.accept(contribution(north)).plan_id == north2.id
    assert ledger.accept(contribution(north2)).verdict == "refused"
    assert ledger.contributions("r1", 1, 2) == [contribution(north), done]
    closed = ledger.close_round("r1", 1, 2, None, "all answered").closed_set
    assert closed == (contribution(north).digest, done.digest)
    assert ledger.contributions("r1", 1, 1) == [done]


def test_other_work_does_not_carry_over(ledger: Ledger) -> None:
    south, _ = begin(ledger)
    ledger.accept(contribution(south))
    ledger.abandon_round("r1", 1, 1, "below quorum")
    other = plan(2, "south", name="other")
    ledger.plan_round(RoundRow("r1", 1, 2, started=1.0), [other])
    assert ledger.carry_over("r1", 1, 2) == []
    assert ledger.open_plans("south") == [other]


def last_counted(ledger: Ledger, run: str, site: str, before: int | None = None) -> str:
    """What is said of a site alone, which must be what is said of it among others."""
    alone = ledger.last_counted(run, site, before)
    among = ledger.all_last_counted(run, ["east", "north", "south"], before)
    assert among[site] == alone
    assert ledger.all_last_counted(run, [], before) == {}
    return alone


def test_the_last_counted_contribution_of_a_history(ledger: Ledger) -> None:
    assert finish(ledger, 1)
    second = finish(ledger, 2)
    assert last_counted(ledger, "r1", "north") == second[0]
    assert last_counted(ledger, "r1", "south") == second[1]
    assert last_counted(ledger, "r1", "east") == ""
    first = last_counted(ledger, "r1", "north", before=2)
    assert first == ledger.round("r1", 1).closed_set[0]

    south, north = begin(ledger, round=3)
    for one in (south, north):
        ledger.accept(contribution(one))
    assert last_counted(ledger, "r1", "north") == second[0], "not committed yet"
    ledger.close_round("r1", 3, 1, [contribution(south).digest], "chosen")
    ledger.commit_round("r1", 3, 1, model="m")
    assert last_counted(ledger, "r1", "north") == second[0], "it was not closed in"
    assert last_counted(ledger, "r1", "south") == contribution(south).digest

    ledger.create_run(run_row("r2", "child", parent=("r1", 1)))
    assert last_counted(ledger, "r2", "north") == first
    own = finish(ledger, 1, run="r2")
    assert last_counted(ledger, "r2", "north") == own[0]
    ledger.create_run(run_row("r3", "grandchild", parent=("r2", 0)))
    assert last_counted(ledger, "r3", "north") == first


# ----------------------------------------------------------------------------------- exchanges


def test_the_attempts_of_a_round(ledger: Ledger) -> None:
    finish(ledger, 1)
    begin(ledger, round=2)
    ledger.abandon_round("r1", 2, 1, "below quorum")
    ledger.plan_round(RoundRow("r1", 2, 2, started=1.0), [plan(2, "south", round=2)])
    assert [(r.attempt, r.state) for r in ledger.attempts("r1", 2)] == [
        (1, "abandoned"),
        (2, "planned"),
    ]
    assert ledger.attempts("r1", 3) == []
    newest = ledger.last_committed("r1")
    assert newest == ledger.round("r1", 1)


def test_a_candidate_is_assessed_in_an_exchange_of_its_own(ledger: Ledger) -> None:
    asked = [plan(site=site, kind="assess") for site in ("north", "south")]
    begin(ledger)
    with pytest.raises(Conflict, match="has to be closed before assess begins"):
        ledger.open_exchange("r1", 1, 1, "assess", asked)
    ledger.close_round("r1", 1, 1, None, "deadline")
    with pytest.raises(InvalidInput):
        ledger.open_exchange("r1", 1, 1, "reassess", asked)
    ledger.open_exchange("r1", 1, 1, "assess", asked)
    assert ledger.exchange_open("r1", 1, 1, "assess")
    assert not ledger.exchange_open("r1", 1, 1, "train")
    assert ledger.open_plans("north") == [asked[0]]
    assert ledger.accept(contribution(asked[0])).verdict == "counted"
    for _ in range(2):
        ledger.close_exchange("r1", 1, 1, "assess")
    assert ledger.accept(contribution(asked[1])).verdict == "late"
    assert ledger.contributions("r1", 1, 1, "assess") == [contribution(asked[0])]
    ledger.commit_round("r1", 1, 1, model="m")
    assert ledger.round("r1", 1).closed_set == (), "sums of an assessment are not closed in"


def test_assessing_again_after_a_restart(ledger: Ledger) -> None:
    begin(ledger)
    ledger.close_round("r1", 1, 1, None, "deadline")
    north, south = (plan(site=site, kind="assess") for site in ("north", "south"))
    ledger.open_exchange("r1", 1, 1, "assess", [north, south])
    for one in (north, south):
        ledger.accept(contribution(one))
    # The same candidate for north, another one for south.
    other = plan(site="south", kind="assess", name="other candidate")
    ledger.open_exchange("r1", 1, 1, "assess", [north, other])
    assert ledger.open_plans("north") == []
    assert ledger.open_plans("south") == [other]
    assert ledger.contributions("r1", 1, 1, "assess") == [contribution(north)]
    assert ledger.accept(contribution(other, "new")).verdict == "counted"
    assert len(ledger.contributions("r1", 1, 1, "assess")) == 2


# ----------------------------------------------------------------------------------- the chain


def test_the_chain_tells_the_run_and_shows_what_was_changed(ledger: Ledger) -> None:
    finish(ledger)
    ledger.extend_run("r1", 9)
    chain = ledger.entries("r1")
    assert [entry.kind for entry in chain] == [
        "created", "planned", "accepted", "accepted", "closed", "committed", "extended",
    ]  # fmt: skip
    assert ledger.run("r1").config_digest in chain[0].document
    assert ledger.verify_entries("r1") == chain[-1].digest
    assert not any("north" in entry.document for entry in chain), "names of sites can be erased"
    document = tables.entries.c.document
    for change in (
        sa.update(tables.entries)
        .where(tables.entries.c.number == 3)
        .values(document=sa.func.replace(document, "train", "trein")),
        sa.delete(tables.entries).where(tables.entries.c.number == 3),
    ):
        with ledger._writing() as db:
            db.execute(change)
        with pytest.raises(DataCorrupt, match="entry 3") as caught:
            ledger.verify_entries("r1")
        assert caught.value.facts["entry"] == 3


# ------------------------------------------------------------------------------------- crashes


SENDS = """
import os, sys
from pathlib import Path
from orchestrator.ledger import ContributionRow, Ledger, PlanRow, RoundRow, RunRow
from orchestrator.store import Store
from protos.digest import digest
home = Path(sys.argv[1])
ledger, store = Ledger.open(home / "ledger.sqlite"), Store(home / "store")
ledger.create_run(RunRow("r", "run", {}, digest(b"{}"), 1, 0.0))
plans = [PlanRow("r", 1, 1, "train", f"s{n}", b"", digest(b"w")) for n in range(300)]
ledger.plan_round(RoundRow("r", 1, 1), plans)
print("ready", flush=True)
for plan in plans:
    path = store.scratch(plan.site)
    path.write_bytes(plan.site.encode())
    index = store.put_file(path, "0" * 64)
    header = plan.site.encode()
    ledger.accept(ContributionRow(
        digest(header), plan.id, "r", 1, 1, "train", plan.site, plan.work_digest, header, b"", "f",
        index.digest, "0" * 64, index.nbytes, None, 0.0,
    ))
    print(plan.site, flush=True)
sys.stdin.read()
"""


def test_killed_between_writes_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    """An accepted row has its file; an acknowledged contribution has its row."""
    command = [sys.executable, "-c", SENDS, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().strip() for _ in range(30)][1:]
    process.kill()
    acknowledged += [line.strip() for line in process.stdout if line.endswith("\n")]
    process.stdin.close()
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    store = Store(tmp_path / "store")
    with closing(Ledger.open(tmp_path / "ledger.sqlite")) as ledger:
        rows = ledger.contributions("r", 1, 1)
        assert set(acknowledged) <= {row.site for row in rows}
        assert len(rows) <= len(acknowledged) + 1
        for row in rows:
            assert store.read_range(row.index, 0, row.nbytes) == row.site.encode()
            store.verify(row.index)
        assert len(ledger.open_plans(f"s{len(rows)}")) == 1
        ledger.verify_entries("r")
