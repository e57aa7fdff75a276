"""The queue of runs: one runs at a time, in the order of submission; nothing ever blocks it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from orchestrator.compute.errors import ComputeDied
from orchestrator.holding import after_rejected, held_round, settle
from orchestrator.intact import check_intact
from orchestrator.ledger import RoundRow, RunRow
from orchestrator.retention import retire
from orchestrator.rounds.engine import Engine
from orchestrator.rounds.first import first
from orchestrator.rounds.page import Outcome, run_round
from orchestrator.run_config import RunConfig
from orchestrator.views import RunState
from protos.errors import Conflict, FarflungError, Unavailable, reference_id
from protos.faults import reach

log = logging.getLogger(__name__)

AGAIN_S = 5.0
"""Between two attempts to reach what a round needs; whoever is reached tries longer itself."""

PAUSE_S = 0.5
"""Between two attempts of a round, then twice as long each time, up to `AGAIN_S`: a site that fails at once
(its disk is full) would else use up all of them before what ails it can pass."""


IDLE: tuple[RunState, ...] = ("queued", "paused")
STOPPED = "the run was stopped"
STOPS_NOW, STOPS_AFTER = "stops at once", "stops after this round"
"""Reasons of a run that is running: what its operator asked for outlives the daemon."""


class Runner:
    """Runs the queue in a thread of its own.

    Args:
        engine: The daemon's parts.
        changed: Called with a run's id when its view changed, and whether that is only because
            one more of its rounds is committed.
    """

    def __init__(self, engine: Engine, changed: Callable[[str, bool], None]) -> None:
        self._engine, self._changed = engine, changed
        self._wake = threading.Condition()
        self._ending = threading.Event()
        self._news = True
        self._thread = threading.Thread(target=self._live, name="runner", daemon=True)
        self._tidying = ThreadPoolExecutor(1, thread_name_prefix="tidying")
        self._tidied: Future[None] | None = None
        self.current: str | None = None

    def start(self) -> None:
        """Begin: first with the run that was running when the daemon stopped."""
        self._thread.start()

    def wake(self) -> None:
        """There may be something new in the queue."""
        with self._wake:
            self._news = True
            self._wake.notify_all()

    def end(self) -> None:
        """Stop working; the run under way goes on with the next daemon."""
        with self._wake:
            self._ending.set()
            self._wake.notify_all()
        self._engine.exchange.interrupt()
        self._thread.join(timeout=30)
        self._tidying.shutdown()

    def stop(self, run: str, now: bool) -> None:
        """Stop a run: after the round under way, or at once.

        Raises:
            Conflict: It ends, or begins, just now.
        """
        ledger = self._engine.ledger
        row = ledger.run(run)
        if row.state in IDLE:
            why, ended = "stopped by the operator", time.time()
            ledger.set_run(row.id, state="stopped", reason=why, ended=ended, expect=IDLE)
            self._free(row)
            self._changed(row.id, False)
            return
        ledger.set_run(row.id, reason=STOPS_NOW if now else STOPS_AFTER, expect={"running"})
        self._changed(row.id, False)
        if now and self.current == row.id:
            self._engine.exchange.interrupt()

    # -- the thread -----------------------------------------------------------------------------

    def _live(self) -> None:
        waiting = ""
        while True:
            with self._wake:
                # Taken before the queue is read: what comes meanwhile is news again.
                self._wake.wait_for(lambda: self._news or self._ending.is_set())
                if self._ending.is_set():
                    return
                self._news = False
            try:
                self._next()
                waiting = ""
            except Exception as error:
                # The ledger is out of reach, or what there was to say could not be written down:
                # its disk is full, perhaps. The run stays as it is and is taken up again.
                said = error.message if isinstance(error, FarflungError) else repr(error)
                if waiting != said and not self._ending.is_set():
                    log.exception("the queue waits")
                    self._engine.note("error", "", None, "", f"the queue waits: {said}")
                waiting = said
                self._ending.wait(AGAIN_S)
                self.wake()

    def _next(self) -> None:
        """The run that is under way, or else the next one of the queue, as far as it goes."""
        row = self._engine.ledger.running() or self._engine.ledger.next_queued()
        if row is None:
            return
        self.wake()  # there may be another one behind it
        self.current = row.id
        reach("run.taken")
        try:
            self._run(row)
        except Exception as error:
            if self._ending.is_set():
                # What broke was being taken apart; the next daemon goes on.
                log.info("run %s: left as it is (%s)", row.name, error)
            elif isinstance(error, Unavailable):
                raise
            elif isinstance(error, FarflungError):
                self._pause(row, error.message)
            else:
                mark = reference_id()
                log.exception("run %s: internal error %s", row.name, mark)
                self._pause(row, f"an internal error; the daemon's log has it under {mark}")
        finally:
            self.current = None

    def _run(self, row: RunRow) -> None:
        ledger = self._engine.ledger
        if row.state != "running":
            began = row.started or time.time()
            try:
                row = ledger.set_run(
                    row.id, state="running", reason="", started=began, expect={"queued"}
                )
            except Conflict:
                return None  # its operator stopped it just now
            self._changed(row.id, False)
        elif (left := held_round(ledger, row.id)) is not None and not self._settled(row, left):
            return None  # the daemon before this one ended between the two
        behind = after_rejected(ledger, row.id)
        abandoning, waiting, tries, died, looked = "", "", 0, -1, False
        taken_up = any(attempt.run == row.id for attempt in ledger.open_rounds())
        while not self._ending.is_set():
            row = ledger.run(row.id)
            last = ledger.last_committed(row.id)
            number = max(last.round + 1, behind) if last is not None else 0
            reach("run.round.begun")
            if number > row.rounds:
                self._tidy()
                ledger.set_run(row.id, state="finished", reason="", ended=time.time())
                reach("run.finished")
                self._note("info", row, None, f"run {row.name} finished after {row.rounds} rounds")
                return self._changed(row.id, False)
            if row.reason == STOPS_NOW or (row.reason == STOPS_AFTER and not taken_up):
                return self._stopped(row)
            try:
                if not looked:
                    check_intact(self._engine, row)
                    looked = True
                outcome = self._one(row, number, abandoning)
                taken_up = False
            except ComputeDied as error:
                if died == number or self._ending.is_set():
                    raise
                died = number  # once more: compute starts again, and the round goes on where it is
                self._note("warning", row, number, f"round {number} goes on: {error.message}")
                continue
            except Unavailable as error:
                # What it can't reach comes back, or the operator stops the run.
                if waiting != error.message:
                    self._note("error", row, number, f"round {number} waits: {error.message}")
                waiting = error.message
                self._ending.wait(AGAIN_S)
                continue
            abandoning, waiting = "", ""
            if outcome.state == "committed":
                tries = 0
                self._tidy()  # of the round before: not more than one is behind
                reach("run.tidied")
                self._tidied = self._tidying.submit(self._retire, row, number)
                self._note("info", row, number, f"round {number} of {row.rounds} is committed")
                self._changed(row.id, True)
                continue
            if outcome.state == "held":
                self._note("error", row, number, f"round {number} is held: {outcome.reason}")
                held = held_round(ledger, row.id)
                if held is not None and not self._settled(row, held):
                    return None
                behind = number + 1
            if outcome.state == "again":
                tries, abandoning = tries + 1, outcome.reason
                text = f"round {number}, attempt given up: {outcome.reason}"
                self._note("error", row, number, text)
                if tries >= RunConfig.from_resolved(row.config).cohort.attempts:
                    ledger.abandon_round(
                        row.id, number, self._last_attempt(row, number), outcome.reason
                    )
                    return self._pause(row, f"round {number}: {outcome.reason}")
                self._changed(row.id, False)
                self._ending.wait(min(AGAIN_S, PAUSE_S * 2 ** (tries - 1)))
                continue
            self._changed(row.id, False)
        return None

    def _tidy(self) -> None:
        """Wait until what the last commit made needless is collected: the next round went on."""
        if self._tidied is not None:
            self._tidied.result()
            self._tidied = None

    def _retire(self, row: RunRow, number: int) -> None:
        try:
            retire(self._engine, row, number)
            reach("run.retired")
        except Unavailable as error:  # `farflung gc` finds what stays
            self._note("warning", row, number, f"contributions are kept: {error.message}")

    def _one(self, row: RunRow, number: int, abandoning: str) -> Outcome:
        if number == 0:
            return first(self._engine, row, abandoning)
        return run_round(self._engine, row, number, abandoning)

    def _last_attempt(self, row: RunRow, number: int) -> int:
        rounds = self._engine.ledger.rounds(row.id, all_attempts=True)
        return max(r.attempt for r in rounds if r.round == number)

    def _stopped(self, row: RunRow) -> None:
        ledger = self._engine.ledger
        for attempt in ledger.open_rounds():
            if attempt.run == row.id:
                ledger.abandon_round(row.id, attempt.round, attempt.attempt, STOPPED)
        self._free(row)
        ledger.set_run(row.id, state="stopped", reason="stopped by the operator", ended=time.time())
        self._note("warning", row, None, f"run {row.name} was stopped by the operator")
        self._changed(row.id, False)

    def _free(self, row: RunRow) -> None:
        """Sites that are still at work for a run that was stopped need not go on."""
        ledger = self._engine.ledger
        for last in ledger.rounds(row.id, all_attempts=True)[-1:]:
            plans = [p for p in ledger.plans(row.id, last.round, last.attempt) if not p.answer]
            self._engine.exchange.cancel(plans, [p.site for p in plans], STOPPED)

    def _settled(self, row: RunRow, held: RoundRow) -> bool:
        """Whether a held round is decided upon and the run goes on; if not, the run is paused."""
        why = settle(self._engine.ledger, row, held)
        if why:
            self._pause(row, why)
        return not why

    def _pause(self, row: RunRow, reason: str) -> None:
        ledger = self._engine.ledger
        if ledger.run(row.id).reason in (STOPS_NOW, STOPS_AFTER):
            self._note("error", row, None, f"run {row.name}: {reason}")
            return self._stopped(row)
        ledger.set_run(row.id, state="paused", reason=reason, ended=time.time())
        self._note("error", row, None, f"run {row.name} is paused: {reason}")
        return self._changed(row.id, False)

    def _note(self, level: str, row: RunRow, round: int | None, text: str) -> None:
        self._engine.note(level, row.id, round, "", text)
