"""The plans that are open at this site, and how far each of them is."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import chain
from time import monotonic
from typing import Any

from protos.plan import Plan, round_of
from protos.v1 import site_pb2

MOVING = (site_pb2.Progress.FETCHING, site_pb2.Progress.SENDING)
"""States in which a plan waits while no window is open."""

REMEMBERED = 256
"""How many plans that ended are remembered, so that one that comes again is answered, not done."""


def order_of(plan_id: str) -> tuple[int, int]:
    """Round and attempt of a plan, by which those of one run and kind stand in order."""
    return round_of(plan_id), attempt_of(plan_id)


def attempt_of(plan_id: str) -> int:
    """Which attempt a plan is of; 0 where the orchestrator names something else."""
    parts = plan_id.split("/")
    return int(parts[2]) if len(parts) == 4 and parts[2].isdecimal() else 0


def told(
    plan_id: str,
    state: site_pb2.Progress.State.ValueType,
    done: float = 0.0,
    planned: float = 0.0,
    unit: str = "",
) -> site_pb2.Progress:
    """Where a plan is, outside of training: there is no loss then."""
    return site_pb2.Progress(
        plan_id=plan_id, state=state, done=done, planned=planned, unit=unit, loss=float("nan")
    )


def precedes(older: Plan, newer: Plan) -> bool:
    """Whether a plan is to train for an earlier round of the same run."""
    of_run = older.run == newer.run and older.kind == newer.kind == "train"
    return of_run and older.round < newer.round


def serves(older: Plan, newer: Plan) -> bool:
    """Whether the work for an earlier round counts for a newer plan."""
    return precedes(older, newer) and newer.takes(older.base)


@dataclass
class Assignment:
    """One open plan.

    Attributes:
        plan: The plan.
        state: Where it is, as in `Progress`.
        done: Of ``planned``, in ``unit``.
        planned: See ``done``.
        unit: See ``done``.
        waits_until: When a window opens that it waits for, Unix time; 0 if it doesn't wait.
        since: When it came, on the monotonic clock.
        prepared_s: Seconds that it has spent preparing, without the stretch under way.
        preparing_since: When that began, on the monotonic clock; None while it does not prepare.
        finishing: The deadline is near, and the orchestrator wants what is done by then.
        begun: The work is under way here.
        cancelled: The orchestrator does not want it any more.
        begun_again: Its trainer was killed from outside, and another one took it up.
        leader: The one whose work this one shares: another attempt of the same work was under way
            already when it came, and is not done twice; or work for an earlier round that counts for it.
    """

    plan: Plan
    state: site_pb2.Progress.State.ValueType = site_pb2.Progress.WAITING
    done: float = 0.0
    planned: float = 0.0
    unit: str = ""
    waits_until: float = 0.0
    since: float = field(default_factory=monotonic)
    prepared_s: float = 0.0
    preparing_since: float | None = None
    finishing: bool = False
    begun: bool = False
    cancelled: bool = False
    begun_again: bool = False
    leader: Assignment | None = None

    def note(self, progress: site_pb2.Progress) -> site_pb2.Progress:
        """It is that far, as it is told of this plan."""
        self.state, self.waits_until = progress.state, progress.waits_until
        self.done, self.planned, self.unit = progress.done, progress.planned, progress.unit
        said = site_pb2.Progress()
        said.CopyFrom(progress)
        # What was prepared in an earlier round did not hold this one up.
        same = self.leader if self.leader and self.leader.plan.round == self.plan.round else self
        said.plan_id, said.prepared_s = self.plan.id, same.prepared
        return said

    def prepares(self, still: bool) -> None:
        """The trainer starts or loads the task for it, or does so no more."""
        self.begun = self.begun or still
        self.prepared_s, self.preparing_since = self.prepared, monotonic() if still else None

    @property
    def prepared(self) -> float:
        """Seconds that it has spent preparing so far."""
        since = self.preparing_since
        return self.prepared_s + (monotonic() - since if since is not None else 0.0)

    def told(self) -> site_pb2.Progress:
        """Where it is, once more."""
        return told(self.plan.id, self.state, self.done, self.planned, self.unit)

    def facts(self) -> dict[str, Any]:
        """The same for the command line."""
        return {
            "plan": self.plan.id,
            "state": site_pb2.Progress.State.Name(self.state).lower(),
            "done": self.done,
            "planned": self.planned,
            "unit": self.unit,
        }


class OpenPlans:
    """Open plans by id; outcomes of those that ended without a contribution; those that were answered.

    Attributes:
        turn: Held by whoever decides about plans: an offer, an answer and an end of work each look at
            several, and come from different threads.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()
        self._lock = threading.Lock()
        self._open: dict[str, Assignment] = {}
        # An exchange that is opened again may ask for other work under the same id.
        self._outcomes: OrderedDict[str, tuple[str, site_pb2.Outcome]] = OrderedDict()
        self._answered: OrderedDict[tuple[str, ...], tuple[int, str]] = OrderedDict()

    def add(self, assignment: Assignment) -> bool:
        """Open a plan; False if it is open already. One whose work is under way follows it."""
        with self._lock:
            plan = assignment.plan
            if plan.id in self._open:
                return False
            leaders = [a for a in self._open.values() if a.leader is None and not a.cancelled]
            same = (a for a in leaders if a.plan.work_digest == plan.work_digest)
            older = (a for a in leaders if a.begun and serves(a.plan, plan))
            assignment.leader = next(chain(same, older), None)
            self._open[plan.id] = assignment
            return True

    def overtaken(self, plan: Plan) -> list[Assignment]:
        """Open plans of earlier rounds that a newer plan makes needless, newest first.

        All but the one whose work is under way, if it counts for the newer plan.
        """
        with self._lock:
            older = [a for a in self._open.values() if precedes(a.plan, plan)]
        older.sort(key=lambda a: order_of(a.plan.id), reverse=True)
        return [a for a in older if not (a.leader is None and a.begun and serves(a.plan, plan))]

    def followers(self, leader: Assignment) -> list[Assignment]:
        """Open plans that share another one's work, in the order in which they came."""
        with self._lock:
            return [a for a in self._open.values() if a.leader is leader]

    def succeed(self, leader: Assignment) -> Assignment | None:
        """One ended without a contribution: the newest of its followers leads the others now."""
        if not (followers := self.followers(leader)):
            return None
        *others, newest = followers
        newest.leader = None
        for other in others:
            other.leader = newest
        return newest

    def get(self, plan_id: str) -> Assignment | None:
        """An open plan."""
        with self._lock:
            return self._open.get(plan_id)

    def close(self, plan_id: str, work_digest: str = "", again: bool = False) -> None:
        """A plan was answered; or, with ``again``, it ended and may be offered anew.

        Args:
            plan_id: The plan.
            work_digest: What was answered; a plan that asks for other work by now stays open.
            again: See above.
        """
        with self._lock:
            open_here = self._open.get(plan_id)
            own = open_here.plan.work_digest if open_here is not None else work_digest
            if work_digest and own != work_digest:
                return
            self._open.pop(plan_id, None)
            key, attempt = _round_of(plan_id), attempt_of(plan_id)
            if not again and attempt >= self._answered.get(key, (0, ""))[0]:
                self._answered[key] = attempt, own
                while len(self._answered) > REMEMBERED:
                    self._answered.popitem(last=False)

    def answered(self, plan: Plan) -> bool:
        """Whether a plan, or a later attempt, was answered: its offer was then sent before that."""
        with self._lock:
            attempt, work = self._answered.get(_round_of(plan.id), (0, ""))
        same = plan.attempt == attempt and work in ("", plan.work_digest)
        return same or plan.attempt < attempt

    def forget_answers(self) -> None:
        """What a new stream offers is wanted: its orchestrator may come from a backup."""
        with self._lock:
            self._answered.clear()

    def fail(self, plan: Plan, outcome: site_pb2.Outcome) -> None:
        """A plan ended without a contribution."""
        with self._lock:
            self._open.pop(plan.id, None)
            self._outcomes[plan.id] = plan.work_digest, outcome
            while len(self._outcomes) > REMEMBERED:
                self._outcomes.popitem(last=False)

    def outcome(self, plan: Plan) -> site_pb2.Outcome | None:
        """How a plan ended without a contribution, if it did."""
        with self._lock:
            work, outcome = self._outcomes.get(plan.id, ("", None))
        return outcome if work == plan.work_digest else None

    def all(self) -> list[Assignment]:
        """All open plans, in the order in which they came."""
        with self._lock:
            return list(self._open.values())


def _round_of(plan_id: str) -> tuple[str, ...]:
    """What all attempts of an exchange have in common."""
    run, *rest = plan_id.split("/")
    return (run, *rest[:1], *rest[2:])
