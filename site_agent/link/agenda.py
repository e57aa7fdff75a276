"""What becomes of a plan at this site: offered, moved on, cancelled, finished, failed, answered."""

from __future__ import annotations

from protos.errors import FarflungError, PolicyRefused
from protos.faults import reach
from protos.plan import Plan
from protos.v1 import site_pb2
from site_agent.link.disclosure import Disclosure
from site_agent.link.fetcher import Fetcher
from site_agent.link.journal import Journal
from site_agent.link.line import Line
from site_agent.link.outbox import Entry, Outbox, Verdict
from site_agent.link.plans import MOVING, Assignment, OpenPlans, told
from site_agent.link.policy import Policy
from site_agent.link.sender import Sender
from site_agent.link.stream import Stream
from site_agent.link.worker import Worker


class Agenda:
    """The open plans, and who is told of each when something happens to it.

    Args:
        plans: The open plans.
        outbox: What is finished.
        policy: What this site takes on.
        disclosure: What it says of its errors.
        line: When it may move bytes.
        journal: The log.

    Attributes:
        turn: Held while it is decided about plans; see `OpenPlans`.
    """

    _fetcher: Fetcher
    _worker: Worker
    _stream: Stream
    _sender: Sender

    def __init__(
        self,
        plans: OpenPlans,
        outbox: Outbox,
        policy: Policy,
        disclosure: Disclosure,
        line: Line,
        journal: Journal,
    ) -> None:
        self._plans, self.turn, self._outbox = plans, plans.turn, outbox
        self._policy, self._disclosure, self._line, self._journal = (
            policy,
            disclosure,
            line,
            journal,
        )

    def parts(self, fetcher: Fetcher, worker: Worker, stream: Stream, sender: Sender) -> None:
        """Who fetches, works, tells and sends; before any of them runs."""
        self._fetcher, self._worker, self._stream, self._sender = fetcher, worker, stream, sender

    # -- what the orchestrator asks ------------------------------------------------------------------

    def offered(self, encoded: bytes, base: site_pb2.SmallModel | None = None) -> None:
        """The orchestrator asks for work, perhaps with the model that it begins from."""
        try:
            plan = Plan.decode(encoded)
        except FarflungError as error:
            self._journal.error("a plan can't be read", reason=error.message)
            return
        with self.turn:
            self._consider(plan, base)

    def _consider(self, plan: Plan, base: site_pb2.SmallModel | None = None) -> None:
        if self._is_known(plan):
            return
        reach("plan.heard")
        assignment = Assignment(plan)
        for older in self._plans.overtaken(plan):
            if self._outbox.of_work(older.plan.work_digest) is None:  # it would have its answer
                self._drop(older, f"round {plan.round} has begun")
        finished = self._outbox.of_work(plan.work_digest) or self._outbox.for_earlier(plan)
        if finished is not None:
            self._journal.info("this work is finished already", plan=plan.id)
            reach("plan.known")
            if plan.id not in finished.plans:
                finished.plans.append(plan.id)
            self._plans.add(assignment)
            self.moved(assignment, told(plan.id, site_pb2.Progress.SENDING))
            self._sender.nudge(finished.digest)
            return
        try:
            self._policy.check_plan(plan)
        except PolicyRefused as error:
            self._journal.warning("plan refused", plan=plan.id, reason=error.message)
            self.failed(assignment, "PolicyRefused", self._disclosure.own(error))
            return
        self._plans.add(assignment)
        work = plan.work.model_dump(exclude_none=True)
        self._journal.info("plan accepted", plan=plan.id, work=work)
        self.moved(assignment, told(plan.id, site_pb2.Progress.WAITING))
        if base is not None and base.HasField("head"):
            self._fetcher.came(plan.base, base)
            reach("plan.based")
        reach("plan.accepted")
        if assignment.leader is None:
            self._worker.submit(assignment)
        else:
            self.moved(assignment, assignment.leader.told())

    def _is_known(self, plan: Plan) -> bool:
        if (open_here := self._plans.get(plan.id)) is not None:
            if open_here.plan.work_digest == plan.work_digest:
                # An orchestrator that comes back asks again.
                self.moved(open_here, open_here.told())
                return True
            self._drop(open_here, "its exchange was opened again, for other work")
        if (outcome := self._plans.outcome(plan)) is not None:
            self._stream.outcome(outcome)
        return outcome is not None or self._plans.answered(plan)

    def finish(self, plan_id: str) -> None:
        """The deadline is near: what is done by then is wanted."""
        if (assignment := self._plans.get(plan_id)) is not None and not assignment.finishing:
            self._journal.info("the deadline is near: what is done is contributed", plan=plan_id)
            leader = assignment.leader or assignment
            assignment.finishing = leader.finishing = True
            reach("plan.finishing")
            self._worker.finish(leader.plan.id)

    def cancelled(self, plan_id: str, reason: str) -> None:
        """A plan is not wanted any more."""
        with self.turn:
            if (assignment := self._plans.get(plan_id)) is None:
                return
            self._drop(assignment, reason)
            leader = assignment.leader
            if leader is not None and leader.plan.round < assignment.plan.round:
                self.cancelled(leader.plan.id, reason)  # nobody waits for that work any more

    def _drop(self, assignment: Assignment, reason: str) -> None:
        plan_id = assignment.plan.id
        self._journal.info("plan cancelled", plan=plan_id, reason=reason)
        assignment.cancelled = True
        reach("plan.cancelled")
        self._plans.close(plan_id, again=True)
        self._stream.forget(plan_id)
        self._worker.cancel(plan_id)
        self._hand_on(assignment)

    # -- what the parts tell ---------------------------------------------------------------------

    def moved(self, assignment: Assignment, progress: site_pb2.Progress) -> None:
        """A plan is in another state, or further, and those that share its work with it."""
        if progress.state in MOVING:
            progress.waits_until = self._line.network.opens
        for one in (assignment, *self._plans.followers(assignment)):
            self._stream.progress(one.note(progress))

    def tell_of_the_line(self) -> None:
        """A window opened or closed: what moves bytes says until when it waits."""
        for assignment in self._plans.all():
            if assignment.state in MOVING:
                self.moved(assignment, assignment.told())

    def finished(self, assignment: Assignment, entry: Entry) -> None:
        """A contribution is in the outbox."""
        with self.turn:
            shared = [a.plan.id for a in self._plans.followers(assignment)]
            entry.plans += shared
            if entry.verdict is not None:  # the sender was faster
                self._sender.ask(shared)
        self.sending(entry, 0, entry.index.nbytes)
        self._sender.nudge()

    def failed(self, assignment: Assignment, error: str, text: str) -> None:
        """A plan ends without a contribution."""
        with self.turn:
            self._fail(assignment, error, text)
            self._hand_on(assignment)

    def _hand_on(self, ended: Assignment) -> None:
        """Whoever shared the work of a plan that ended without it does it now."""
        if (newest := self._plans.succeed(ended)) is not None:
            self._worker.submit(newest)

    def _fail(self, assignment: Assignment, error: str, text: str) -> None:
        plan_id = assignment.plan.id
        outcome = site_pb2.Outcome(plan_id=plan_id, error=error, message=text)
        self._plans.fail(assignment.plan, outcome)
        reach("plan.failed")
        self._disclosure.sent("outcome", plan=plan_id, error=error, message=text)
        self._stream.outcome(outcome)

    def sending(self, entry: Entry, done: int, planned: int) -> None:
        """Bytes of a contribution left."""
        for plan_id in entry.plans:
            if (assignment := self._plans.get(plan_id)) is not None:
                state = site_pb2.Progress.SENDING
                self.moved(assignment, told(plan_id, state, done, planned, "bytes"))

    def answered(self, entry: Entry, verdict: Verdict, error: str, message: str) -> None:
        """A contribution has its final answer."""
        facts = {"contribution": entry.digest, "plans": entry.plans}
        if verdict == "counted":
            self._journal.info("contribution counted", **facts)
        else:
            self._journal.warning(f"contribution {verdict}", error=error, reason=message, **facts)

    def closed(self, plan_id: str, work_digest: str = "") -> None:
        """A plan has its answer, unless it asks for other work than was answered."""
        self._plans.close(plan_id, work_digest)
        self._stream.forget(plan_id)

    def unanswered(self, plan_id: str) -> None:
        """A contribution was meant for this plan too, but was answered for another attempt."""
        with self.turn:
            if (assignment := self._plans.get(plan_id)) is not None:
                self._plans.close(plan_id, again=True)
                self._consider(assignment.plan)

    def unsendable(self, entry: Entry, error: FarflungError) -> None:
        """A contribution's payload is damaged here; it was removed."""
        self._journal.error("a contribution is damaged", contribution=entry.digest)
        with self.turn:
            lost = [a for a in map(self._plans.get, entry.plans) if a is not None]
            for assignment in lost:
                self._fail(assignment, type(error).__name__, self._disclosure.own(error))
            for assignment in lost:
                self._hand_on(assignment)
