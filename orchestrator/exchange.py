"""The exchange under way: what sites do becomes events, events become a decision to close.

Handlers of any thread put events into one queue; the round's own thread takes them out, feeds the
pure machine of `gathering`, and waits no longer than it says.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.board import Board
from orchestrator.gathering import Decision, Gathering, Member
from orchestrator.ledger import Ledger, PlanRow
from orchestrator.sessions import Session, Sessions
from orchestrator.troubles import Troubles
from orchestrator.views import WorkState
from protos.errors import NotFound
from protos.faults import reach
from protos.v1 import site_pb2

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 3600.0
LONGEST_PREPARING_S = 366 * 24 * 3600.0
LAST_TIME_S = 2.0**36
"""Later than any time that a site may name (the year 4147); dates can still be made of it."""


@dataclass(frozen=True)
class _Event:
    kind: str  # counted | failed | attached | gone | preparing | prepared | wake
    site: str = ""
    plan_id: str = ""
    reason: str = ""
    seconds: float = 0.0  # preparing, prepared: as the site counts them


@dataclass(frozen=True)
class Terms:
    """How an exchange is waited for.

    Attributes:
        quorum: Least number of counted sites.
        seconds: Until the deadline.
        patience_s: How much of a site's preparing, at most, does not run against it.
        leads: Sites that are told to finish what they have, and how many seconds before their deadline.
    """

    quorum: int
    seconds: float
    patience_s: float = 0.0
    leads: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gathered:
    """How an exchange ended.

    Attributes:
        decision: close or abandon, with the reason; ``interrupted`` if somebody asked to stop.
        counted: Sites that are counted.
        missing: The others, with the reason.
        interrupted: Stopped from outside before a decision.
    """

    decision: Decision
    counted: tuple[str, ...]
    missing: dict[str, str]
    interrupted: bool = False


class Exchange:
    """Listens to the sites for whichever exchange is under way.

    Args:
        ledger: Says what was answered before.
        board: Shows what the sites do.
        grace_s: How long a counted quorum waits for sites that are gone.
        note: Called with (level, site, text) for what an operator should read.
    """

    def __init__(
        self, ledger: Ledger, board: Board, grace_s: float, note: Callable[[str, str, str], None]
    ) -> None:
        self._ledger, self._board, self._grace_s, self._note = ledger, board, grace_s, note
        self._inbox: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._plan_id = ""
        self._shown = False  # whether answers change the round's rows: not those of an assessment
        self._interrupt = threading.Event()
        self._preparing: dict[str, tuple[bool, float]] = {}  # what the round's thread was told
        self.sessions: Sessions | None = None
        self.troubles = Troubles(ledger, note)
        self.left: set[tuple[str, str]] = set()

    # -- what sites do; any thread ------------------------------------------------------------

    def progress(self, site: str, plan_id: str, state: WorkState, said: site_pb2.Progress) -> None:
        """A site said where it is."""
        if plan_id == self._plan_id:
            self._board.progress(
                site,
                state,
                said.done,
                said.planned or None,
                said.unit[:16],
                said.loss if math.isfinite(said.loss) else None,
                said.learning_rate or None,
                said.examples_per_s or None,
                said.waits_until if 0 < said.waits_until < LAST_TIME_S else None,
            )
            self._prepares(site, plan_id, state == "preparing", said.prepared_s)

    def _prepares(self, site: str, plan_id: str, still: bool, said_s: float) -> None:
        seconds = said_s if 0 < said_s < LONGEST_PREPARING_S else 0.0  # nor is it, if it is NaN
        before = self._preparing.get(site, (False, 0.0))
        if before != (still, seconds):
            self._preparing[site] = (still, seconds)
            kind = "preparing" if still else "prepared"
            self._inbox.put(_Event(kind, site, plan_id, seconds=seconds))

    def counted(self, site: str, plan_id: str, header_digest: str) -> None:
        """A contribution is durable and counts."""
        self.troubles.over(site)
        if plan_id == self._plan_id:
            self._show(site, "counted")
            self._inbox.put(_Event("counted", site, plan_id))
            reach("gather.counted")

    def failed(self, site: str, plan_id: str, error: str, message: str, how: str) -> None:
        """A plan ended without a contribution."""
        self._note("error", site, message)
        if plan_id == self._plan_id:
            state: WorkState = "refused" if how == "refused" else "failed"
            self._show(site, state, error, message)
            self._inbox.put(_Event("failed", site, plan_id, message))
            reach("gather.failed")

    def moved(self, site: str, received: int = 0, sent: int = 0) -> None:
        """Payload bytes moved, seen from the site."""
        self._board.note(site, received=received, sent=sent)

    def troubled(self, site: str, text: str) -> None:
        """A site was turned away, or what it sends can't be taken in just now."""
        self.troubles.tell(site, text)
        self._board.note(site, reason=text)

    def left_run(self, site: str, run: str) -> None:
        """A site takes no further part in a run, named by id or name."""
        try:
            run = self._ledger.run(run).id
        except NotFound as error:
            self._note("warning", site, f"site {site} wants to leave a run: {error.message}")
            return
        self.left.add((run, site))
        self._note("warning", site, f"site {site} left the run {run}")
        if self._plan_id.startswith(f"{run}/"):
            self._ledger.answer_plan(self._plan_id, site, "left", "", "the site left the run")
            self._show(site, "left", "", "the site left the run")
            self._inbox.put(_Event("failed", site, self._plan_id, "the site left the run"))

    def attached(self, site: str) -> None:
        """A site is attached (again)."""
        self._inbox.put(_Event("attached", site))

    def gone(self, site: str) -> None:
        """A site's stream broke."""
        self._board.set_state(site, "gone")
        self._inbox.put(_Event("gone", site))

    def _show(self, site: str, state: WorkState, error: str = "", reason: str = "") -> None:
        if self._shown:
            self._board.set_state(site, state, error, reason)

    def interrupt(self) -> None:
        """End the wait without a decision: the one under way, or else the next one."""
        self._interrupt.set()
        self._inbox.put(_Event("wake"))

    # -- the round's thread -------------------------------------------------------------------

    def gather(
        self, rows: Sequence[PlanRow], terms: Terms, base: site_pb2.SmallModel | None = None
    ) -> Gathered:
        """Push the plans, wait for the answers, decide.

        Args:
            rows: The plans of one exchange.
            terms: How long it is waited for whom.
            base: The base of all the plans, if it is so small that it goes out with them.
        """
        sessions = self.sessions
        if sessions is None:
            raise RuntimeError("the exchange was not connected to the sessions")
        now = time.monotonic()
        reach("gather.begun")
        self._preparing = {}
        self._plan_id = rows[0].id if rows else ""  # from here on events are kept
        first = rows[0] if rows else None
        self._shown = first is not None and first.kind in ("train", "init")
        known = self._ledger.plans(first.run, first.round, first.attempt) if first else []
        answers = {r.site: r for r in known if r.id == self._plan_id}
        members = {row.site: Member(lead_s=terms.leads.get(row.site)) for row in rows}
        end = now + terms.seconds
        machine = Gathering(terms.quorum, end, self._grace_s, members, terms.patience_s)
        for row in rows:
            row = answers.get(row.site, row)
            if row.answer == "counted":
                machine = machine.counted(row.site)
                self._show(row.site, "counted")
                reach("gather.known")
            elif row.answer:
                machine = machine.failed(row.site, row.message or row.answer)
            elif (session := sessions.get(row.site)) is not None:
                self._offer(session, row, base)
                reach("gather.offered")
            else:
                machine = machine.gone(row.site, now)
                self._show(row.site, "gone")
        try:
            return self._wait(machine)
        finally:
            self._plan_id = ""

    def _offer(self, session: Session, row: PlanRow, base: site_pb2.SmallModel | None) -> None:
        """Push a plan, with its base unless the site was just given it: to be assessed, say."""
        if base is not None and session.given == base.head.index:
            base = None
        if base is not None:
            session.given = base.head.index
            self.moved(row.site, received=len(base.data))
        session.send(site_pb2.ToSite(plan=site_pb2.PlanOffer(plan=row.plan, base=base)))

    def _wait(self, machine: Gathering) -> Gathered:
        while True:
            now = time.monotonic()
            decision = machine.decide(now)
            if decision.kind != "wait" or self._interrupt.is_set():
                interrupted = decision.kind == "wait"
                machine = self._explained(machine)
                decision = machine.decide(now)
                reach("gather.decided")
                if interrupted:
                    self._interrupt.clear()
                return Gathered(decision, machine.counted_sites, machine.missing, interrupted)
            if decision.finish:
                self._finish(decision.finish)
                machine = machine.told(decision.finish)
                continue
            try:
                event = self._inbox.get(
                    timeout=min(LONGEST_WAIT_S, max(0.0, decision.wake_at - now))
                )
            except queue.Empty:
                continue
            reach("gather.heard")
            machine = self._apply(machine, event)

    def _explained(self, machine: Gathering) -> Gathering:
        """The same with what is known of those who have not answered."""
        for site, member in machine.members.items():
            here = self.sessions is not None and self.sessions.get(site) is not None
            why = self.troubles.of(site, here)
            if not why and member.gone_since is None:
                why = self._board.standing(site)
            machine = machine.known(site, why)
        return machine

    def _apply(self, machine: Gathering, event: _Event) -> Gathering:
        if event.plan_id and event.plan_id != self._plan_id:
            return machine
        if event.kind == "counted":
            return machine.counted(event.site)
        if event.kind == "failed":
            return machine.failed(event.site, event.reason)
        if event.kind == "attached":
            return machine.back(event.site)
        if event.kind == "gone":
            return machine.gone(event.site, time.monotonic())
        if event.kind in ("preparing", "prepared"):
            still = event.kind == "preparing"
            return machine.prepares(event.site, time.monotonic(), still, event.seconds)
        return machine

    def _finish(self, sites: Sequence[str]) -> None:
        """Tell sites that the deadline is near."""
        message = site_pb2.ToSite(finish=site_pb2.Finish(plan_id=self._plan_id))
        for site in sites:
            if self._board.state(site) in ("encoding", "sending"):
                continue  # it has finished
            if self.sessions is not None and self.sessions.send(site, message):
                text = f"site {site} is asked for what it has done: the deadline is near"
                self._note("info", site, text)
                self._board.note(site, finishing=True)
                reach("gather.finishing")

    def cancel(self, rows: Sequence[PlanRow], sites: Sequence[str], reason: str) -> None:
        """Tell sites that their plan is over."""
        for row in rows:
            if row.site in sites and self.sessions is not None:
                message = site_pb2.Cancel(plan_id=row.id, reason=reason)
                self.sessions.send(row.site, site_pb2.ToSite(cancel=message))
                reach("gather.cancelled")
