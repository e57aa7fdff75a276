"""The queue of runs: one after the other, and whatever happens to one of them, the next one's turn comes."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator import runs as runs_module
from orchestrator.compute.errors import ComputeDied
from orchestrator.holding import for_decision, reject, release
from orchestrator.ledger import Ledger, PlanRow, RoundRow, RunRow
from orchestrator.rounds.engine import Engine
from orchestrator.rounds.page import Outcome
from orchestrator.runs import Runner
from protos.errors import ComputeFailed, Conflict, FarflungError, OutOfSpace, Unavailable
from tests.support.disk import flip
from tests.support.workbench import Workbench

WAIT_S = 20.0
Round = Callable[[Engine, RunRow, int, str], Outcome]


class Bench:
    """A runner over a real ledger, whose rounds do what a test says."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.asked: list[tuple[str, int, str]] = []
        self.changes = threading.Condition()
        self.changed: list[str] = []
        self.does: Round = lambda engine, run, number, abandoning: self.commit(run, number)
        self.runner = Runner(bench.engine, self._change)

    def _change(self, run: str, committed: bool) -> None:
        with self.changes:
            self.changed.append(run)
            self.changes.notify_all()

    def round(self, engine: Engine, run: RunRow, number: int, abandoning: str = "") -> Outcome:
        self.asked.append((run.id, number, abandoning))
        return self.does(engine, run, number, abandoning)

    def commit(self, run: RunRow, number: int) -> Outcome:
        rounds = self.bench.ledger.rounds(run.id, all_attempts=True)
        attempts = [r.attempt for r in rounds if r.round == number]
        attempt = max(attempts, default=0) + 1
        for row in self.bench.ledger.open_rounds():
            if row.run == run.id:
                self.bench.ledger.abandon_round(run.id, row.round, row.attempt, "x")
        return Outcome("committed", row=self.bench.commit(run.id, number, attempt=attempt))

    def until(self, run: str, state: str) -> RunRow:
        """Wait until a run is in a state."""
        with self.changes:
            there = self.changes.wait_for(lambda: self.bench.ledger.run(run).state == state, WAIT_S)
        row = self.bench.ledger.run(run)
        assert there, f"{run} is {row.state}: {row.reason}"
        return row


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    work = Workbench(tmp_path)
    bench = Bench(work)
    monkeypatch.setattr(runs_module, "run_round", bench.round)
    monkeypatch.setattr(
        runs_module, "first", lambda engine, run, abandoning="": bench.round(engine, run, 0)
    )
    monkeypatch.setattr(runs_module, "PAUSE_S", 0.01)
    yield bench
    if bench.runner._thread.is_alive():
        bench.runner.end()
    work.close()


def test_runs_are_run_in_the_order_of_submission(bench: Bench) -> None:
    for name in ("a", "b"):
        bench.bench.run(name, rounds=2)
    bench.runner.start()
    bench.until("b", "finished")
    assert [(run, number) for run, number, _ in bench.asked] == [
        *(("a", n) for n in range(3)),
        *(("b", n) for n in range(3)),
    ]
    first, second = bench.bench.ledger.runs()
    assert first.state == "finished"
    assert first.started is not None
    assert first.ended is not None
    assert second.started is not None
    assert first.ended <= second.started


def test_a_run_that_comes_while_nobody_waits_is_seen(bench: Bench) -> None:
    """Between a look at the queue and the wait for news."""
    ledger = bench.bench.ledger
    looked, real = threading.Event(), ledger.next_queued

    def look() -> RunRow | None:
        found = real()
        if found is None and not looked.is_set():
            bench.bench.run("late", rounds=1)
            bench.runner.wake()
            looked.set()
        return found

    ledger.next_queued = look  # type: ignore[method-assign]
    bench.runner.start()
    assert looked.wait(WAIT_S)
    bench.until("late", "finished")


def test_what_is_out_of_reach_for_a_while_does_not_pause_a_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "AGAIN_S", 0.01)
    away = [Unavailable("the object store is away")] * 3

    def does(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if number == 1 and away:
            raise away.pop()
        return bench.commit(run, number)

    bench.does = does
    bench.bench.run("r", rounds=1)
    bench.runner.start()
    bench.until("r", "finished")
    assert bench.asked == [("r", 0, ""), *([("r", 1, "")] * 4)]
    waits = [text for text in bench.bench.notes if "waits" in text]
    assert waits == ["round 1 waits: the object store is away"], "said once, not at every attempt"


@pytest.mark.parametrize("error", [Unavailable, OutOfSpace])
def test_a_ledger_that_can_not_be_written_for_a_while_does_not_end_the_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: type[FarflungError]
) -> None:
    """Not even where the failure itself can't be written down."""
    monkeypatch.setattr(runs_module, "AGAIN_S", 0.01)
    ledger, refused = bench.bench.ledger, [error("ledger: no")] * 4
    written = ledger.set_run

    def set_run(*args: Any, **changes: Any) -> RunRow:
        if refused:
            raise refused.pop()
        return written(*args, **changes)

    monkeypatch.setattr(ledger, "set_run", set_run)
    bench.bench.run("r", rounds=1)
    bench.runner.start()
    bench.until("r", "finished")
    assert bench.bench.notes.count("the queue waits: ledger: no") == 1


def test_a_run_that_waits_can_be_stopped(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "AGAIN_S", 0.01)

    def does(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        bench.runner.stop(run.id, now=True)
        raise Unavailable("the object store is away")

    bench.does = does
    bench.bench.run("r", rounds=1)
    bench.runner.start()
    bench.until("r", "stopped")


def test_a_run_that_is_stopped_as_it_begins_stays_stopped(bench: Bench) -> None:
    ledger = bench.bench.ledger
    real = ledger.next_queued

    def look() -> RunRow | None:
        found = real()
        if found is not None and found.id == "stopped":
            bench.runner.stop(found.id, now=True)
        return found

    ledger.next_queued = look  # type: ignore[method-assign]
    for name in ("stopped", "after"):
        bench.bench.run(name, rounds=1)
    bench.runner.start()
    bench.until("after", "finished")
    assert ledger.run("stopped").state == "stopped"
    assert {run for run, *_ in bench.asked} == {"after"}


@pytest.mark.parametrize("now", [True, False])
def test_a_run_that_is_to_stop_is_not_paused_by_the_round_that_it_waits_for(
    bench: Bench, now: bool
) -> None:
    def does(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if number == 0:
            return bench.commit(run, number)
        bench.runner.stop(run.id, now)
        raise ComputeFailed("no memory")

    bench.does = does
    bench.bench.run("r", rounds=2)
    bench.runner.start()
    assert bench.until("r", "stopped").reason == "stopped by the operator"
    assert "run r: no memory" in bench.bench.notes


def test_the_run_that_was_under_way_goes_first(bench: Bench) -> None:
    bench.bench.run("a", rounds=1)
    bench.bench.run("b", rounds=1)
    bench.bench.ledger.set_run("b", state="running", started=1.0)
    bench.runner.start()
    bench.until("a", "finished")
    assert [run for run, *_ in bench.asked] == ["b", "b", "a", "a"]
    assert bench.bench.ledger.run("b").started == 1.0


def test_attempts_are_made_again_and_then_the_run_is_paused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs_module, "PAUSE_S", 0.1)
    bench.bench.run("a", rounds=2)
    bench.bench.run("b", rounds=1)
    times: list[float] = []

    def fails(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if run.id == "b" or number == 0:
            return bench.commit(run, number)
        times.append(time.monotonic())
        attempt = len([1 for r, n, _ in bench.asked if (r, n) == ("a", 1)])
        row = RoundRow("a", 1, attempt)
        engine.ledger.plan_round(row, abandoning=abandoning)
        return Outcome("again", f"below the quorum, {attempt}")

    bench.does = fails
    bench.runner.start()
    row = bench.until("a", "paused")
    assert row.reason == "round 1: below the quorum, 3"
    assert [(n, why) for run, n, why in bench.asked if run == "a"] == [
        (0, ""),
        (1, ""),
        (1, "below the quorum, 1"),
        (1, "below the quorum, 2"),
    ]
    # What makes an attempt fail at once gets time to pass, longer each time.
    assert times[1] - times[0] >= 0.1
    assert times[2] - times[1] >= 0.2
    states = [r.state for r in bench.bench.ledger.rounds("a", all_attempts=True)]
    assert states == ["committed", "abandoned", "abandoned", "abandoned"]
    # It does not stand in the way of others, and may be tried again.
    bench.until("b", "finished")
    bench.does = lambda engine, run, number, abandoning: bench.commit(run, number)
    bench.bench.ledger.set_run("a", state="queued", reason="")
    bench.runner.wake()
    bench.until("a", "finished")


def test_a_run_does_not_go_on_with_what_a_disk_damaged(bench: Bench) -> None:
    """The base, and what counts for the round under way; restored from a copy, the run goes on."""
    work = bench.bench
    work.enrol("east")
    work.run("a", rounds=2)
    base = work.commit("a", 0).model
    covered = work.store.manifest(work.store.index(base).manifest)
    sent = work.contribution("east", covered, {"w": torch.zeros(2)}, run="a")
    asked = PlanRow("a", 1, 1, "train", "east", b"plan", sent.work_digest)
    work.ledger.plan_round(RoundRow("a", 1, 1, started=time.time()), [asked])
    assert work.ledger.accept(sent).verdict == "counted"
    bench.does = lambda engine, run, number, abandoning: bench.commit(run, number)
    bench.runner.start()
    for name, what in (
        (base, "the shared part of the model of round 0"),
        (sent.index, "site east"),
    ):
        copy = work.store.path(name).read_bytes()
        flip(work.store.path(name))
        work.ledger.set_run("a", state="queued", reason="")
        bench.runner.wake()
        row = bench.until("a", "paused")
        assert what in row.reason
        assert "chunk 0 is damaged" in row.reason
        assert not bench.asked
        work.store.path(name).write_bytes(copy)
    work.ledger.set_run("a", state="queued", reason="")
    bench.runner.wake()
    bench.until("a", "finished")


def test_a_success_forgets_earlier_failures(bench: Bench) -> None:
    bench.bench.run("a", rounds=3)

    def every_other(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if number and not abandoning:
            row = RoundRow("a", number, 1)
            engine.ledger.plan_round(row)
            return Outcome("again", "once")
        return bench.commit(run, number)

    bench.does = every_other
    bench.runner.start()
    bench.until("a", "finished")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ComputeFailed("reduce_run raised ValueError"), "reduce_run raised ValueError"),
        (ZeroDivisionError("secret"), "an internal error; the daemon's log has it under"),
    ],
)
def test_an_error_pauses_its_run_and_the_next_one_goes_on(
    bench: Bench, error: Exception, reason: str
) -> None:
    bench.bench.run("a")
    bench.bench.run("b", rounds=1)

    def breaks(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if run.id == "a":
            raise error
        return bench.commit(run, number)

    bench.does = breaks
    bench.runner.start()
    row = bench.until("a", "paused")
    assert row.reason.startswith(reason)
    assert "secret" not in row.reason
    bench.until("b", "finished")


# -- held rounds -------------------------------------------------------------------------------------


def holding(bench: Bench, *numbers: int) -> Round:
    """Holds the rounds of these numbers and commits all others."""

    def does(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if number not in numbers:
            return bench.commit(run, number)
        hold(bench, run.id, number)
        return Outcome("held", f"reason {number}")

    return does


def hold(bench: Bench, run: str, number: int) -> None:
    ledger = bench.bench.ledger
    ledger.plan_round(RoundRow(run, number, 1, started=1.0))
    ledger.close_round(run, number, 1, None, "every site answered")
    reason = f"reason {number}"
    ledger.hold_round(run, number, 1, reason, model=f"m{number}", summary={"held": reason})


def states(bench: Bench, run: str) -> list[str]:
    return [row.state for row in bench.bench.ledger.rounds(run)]


def test_a_held_round_is_rejected_and_the_next_one_follows(bench: Bench) -> None:
    bench.bench.run("a", rounds=4)
    bench.does = holding(bench, 1, 3, 4)
    bench.runner.start()
    bench.until("a", "finished")
    ledger = bench.bench.ledger
    assert states(bench, "a") == ["committed", "abandoned", "committed", "abandoned", "abandoned"]
    assert ledger.round("a", 3).reason == "rejected: reason 3"
    assert ledger.run("a").model == ledger.round("a", 2).model, "the last good one is the run's"
    assert [number for _, number, _ in bench.asked] == [0, 1, 2, 3, 4], "none is tried again"


def test_a_held_round_is_released_where_the_run_says_so(bench: Bench) -> None:
    bench.bench.run("a", rounds=2, gate='{ on_hold = "release" }')
    bench.does = holding(bench, 1)
    bench.runner.start()
    bench.until("a", "finished")
    assert states(bench, "a") == ["committed"] * 3
    released = bench.bench.ledger.round("a", 1)
    assert (released.model, released.summary) == ("m1", {"held": "reason 1"})


@pytest.mark.parametrize("on_hold", ["reject", "release"])
def test_three_held_rounds_in_a_row_wait_for_a_person(bench: Bench, on_hold: str) -> None:
    bench.bench.run("a", rounds=9, gate=f'{{ on_hold = "{on_hold}" }}')
    bench.does = holding(bench, 1, 3, 4, 5)
    bench.runner.start()
    reason = bench.until("a", "paused").reason
    assert reason == (
        "waiting for decision (3 rounds in a row were held): round 5 is held, reason 5. "
        "`farflung release a` or `farflung reject a`"
    )
    assert states(bench, "a")[-1] == "held"


@pytest.mark.parametrize(("decide", "state"), [(release, "committed"), (reject, "abandoned")])
def test_a_round_waits_while_other_runs_go_on(
    bench: Bench, decide: Callable[[Ledger, RoundRow], RoundRow], state: str
) -> None:
    ledger = bench.bench.ledger
    row = bench.bench.run("a", rounds=2, gate='{ on_hold = "wait" }')
    bench.bench.run("b", rounds=1)
    bench.does = lambda engine, run, number, abandoning: holding(
        bench, *([1] if run.id == "a" else [])
    )(engine, run, number, abandoning)
    with pytest.raises(Conflict, match="it is queued, and no round of it waits"):
        for_decision(ledger, row)
    bench.runner.start()
    assert bench.until("a", "paused").reason.startswith("waiting for decision: round 1 is held")
    bench.until("b", "finished")

    decide(ledger, for_decision(ledger, ledger.run("a")))
    with pytest.raises(Conflict, match="no round of it waits"):
        for_decision(ledger, ledger.run("a"))
    ledger.set_run("a", state="queued", expect=("paused",))
    bench.runner.wake()
    bench.until("a", "finished")
    assert states(bench, "a") == ["committed", state, "committed"]
    assert bench.asked.count(("a", 1, "")) == 1, "neither trains again"


@pytest.mark.parametrize(("on_hold", "state"), [("reject", "abandoned"), ("release", "committed")])
def test_a_daemon_that_ended_between_hold_and_decision(
    bench: Bench, on_hold: str, state: str
) -> None:
    bench.bench.run("a", rounds=2, gate=f'{{ on_hold = "{on_hold}" }}')
    bench.bench.commit("a", 0)
    hold(bench, "a", 1)
    bench.bench.ledger.set_run("a", state="running")
    bench.runner.start()
    bench.until("a", "finished")
    assert states(bench, "a") == ["committed", state, "committed"]
    assert bench.asked == [("a", 2, "")]


# -- stopping ---------------------------------------------------------------------------------------


class Gate:
    """A round that waits to be let through."""

    def __init__(self, bench: Bench, at: int) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.bench, self.at = bench, at

    def __call__(self, engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if number == self.at:
            self.entered.set()
            assert self.open.wait(WAIT_S)
        return self.bench.commit(run, number)


def test_stop_ends_after_the_round_under_way(bench: Bench) -> None:
    bench.bench.run("a", rounds=5)
    bench.does = gate = Gate(bench, 2)
    bench.runner.start()
    assert gate.entered.wait(WAIT_S)
    bench.runner.stop("a", now=False)
    gate.open.set()
    row = bench.until("a", "stopped")
    assert row.reason == "stopped by the operator"
    assert [r.round for r in bench.bench.ledger.history("a")] == [0, 1, 2]


def test_a_stop_outlives_the_daemon_and_the_round_under_way_is_finished(bench: Bench) -> None:
    bench.bench.run("a", rounds=5)
    entered, ending = threading.Event(), threading.Event()

    def is_left(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if number == 0:
            return bench.commit(run, number)
        engine.ledger.plan_round(RoundRow("a", 1, 1))
        entered.set()
        assert ending.wait(WAIT_S)
        raise Unavailable("the daemon ends")

    bench.does = is_left
    interrupt = bench.bench.engine.exchange.interrupt
    bench.bench.engine.exchange.interrupt = lambda: (interrupt(), ending.set())[0]  # type: ignore[method-assign]
    bench.runner.start()
    assert entered.wait(WAIT_S)
    bench.runner.stop("a", now=False)
    bench.runner.end()
    assert bench.bench.ledger.run("a").state == "running"

    bench.does = lambda engine, run, number, abandoning: bench.commit(run, number)
    bench.runner = Runner(bench.bench.engine, bench._change)
    bench.runner.start()
    assert bench.until("a", "stopped").reason == "stopped by the operator"
    assert [r.round for r in bench.bench.ledger.history("a")] == [0, 1]


def test_a_daemon_that_is_killed_over_a_stop_at_once_stops_the_run_when_it_is_back(
    bench: Bench,
) -> None:
    bench.bench.run("a", rounds=5)
    bench.bench.commit("a", 0)
    bench.bench.ledger.plan_round(RoundRow("a", 1, 1))
    bench.bench.ledger.set_run("a", state="running")
    bench.runner.stop("a", now=True)
    bench.runner.start()
    bench.until("a", "stopped")
    assert bench.asked == []
    assert bench.bench.ledger.round("a", 1).state == "abandoned"


def test_stop_in_the_last_round_does_not_stop_what_is_extended_later(bench: Bench) -> None:
    bench.bench.run("a", rounds=1)
    bench.does = gate = Gate(bench, 1)
    bench.runner.start()
    assert gate.entered.wait(WAIT_S)
    bench.runner.stop("a", now=False)
    gate.open.set()
    bench.until("a", "finished")
    bench.bench.ledger.extend_run("a", 2)
    bench.bench.ledger.set_run("a", state="queued")
    bench.runner.wake()
    bench.until("a", "finished")
    assert [r.round for r in bench.bench.ledger.history("a")] == [0, 1, 2]


def test_stop_now_interrupts_the_exchange_and_gives_the_round_up(bench: Bench) -> None:
    bench.bench.run("a", rounds=5)
    entered = threading.Event()

    def waits(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if number == 0:
            return bench.commit(run, number)
        engine.ledger.plan_round(RoundRow("a", 1, 1))
        entered.set()
        with bench.changes:
            assert bench.changes.wait_for(engine.exchange._interrupt.is_set, WAIT_S)
        return Outcome("interrupted")

    bench.does = waits
    interrupt = bench.bench.engine.exchange.interrupt

    def told() -> None:
        interrupt()
        with bench.changes:
            bench.changes.notify_all()

    bench.bench.engine.exchange.interrupt = told  # type: ignore[method-assign]
    bench.runner.start()
    assert entered.wait(WAIT_S)
    bench.runner.stop("a", now=True)
    bench.until("a", "stopped")
    row = bench.bench.ledger.round("a", 1)
    assert (row.state, row.reason) == ("abandoned", "the run was stopped")


@pytest.mark.parametrize("state", ["queued", "paused"])
def test_what_does_not_run_is_stopped_at_once(bench: Bench, state: str) -> None:
    bench.bench.run("a")
    bench.bench.ledger.set_run("a", state=state)  # type: ignore[arg-type]
    bench.runner.stop("a", now=False)
    assert bench.bench.ledger.run("a").state == "stopped"
    assert bench.changed == ["a"]


def test_a_daemon_that_ends_leaves_the_run_as_it_is(bench: Bench) -> None:
    """Also if what it is taken apart from breaks under the round."""
    bench.bench.run("a")
    entered, ending = threading.Event(), threading.Event()

    def breaks(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        entered.set()
        assert ending.wait(WAIT_S)
        raise ComputeFailed("compute ended")

    bench.does = breaks
    interrupt = bench.bench.engine.exchange.interrupt
    bench.bench.engine.exchange.interrupt = lambda: (interrupt(), ending.set())[0]  # type: ignore[method-assign]
    bench.runner.start()
    assert entered.wait(WAIT_S)
    bench.runner.end()
    assert not bench.runner._thread.is_alive()
    assert bench.bench.ledger.run("a").state == "running"


def test_a_daemon_without_work_ends_at_once(bench: Bench) -> None:
    bench.runner.start()
    bench.runner.end()
    assert not bench.runner._thread.is_alive()


@pytest.mark.parametrize(("deaths", "state"), [(1, "finished"), (2, "paused")])
def test_compute_may_die_once_in_a_round(bench: Bench, deaths: int, state: str) -> None:
    died = []

    def dies(engine: Engine, run: RunRow, number: int, abandoning: str) -> Outcome:
        if len(died) < deaths:
            died.append(number)
            raise ComputeDied("compute ended")
        return bench.commit(run, number)

    bench.does = dies
    bench.bench.run("r", rounds=1)
    bench.runner.start()
    bench.until("r", state)
    assert [number for _, number, _ in bench.asked] == [0, 0, 1][: 4 - deaths]
