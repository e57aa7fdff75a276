"""The link as a whole: what each part tells the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protos.contribution import Header
from protos.errors import FarflungError, InvalidInput, PolicyRefused
from protos.faults import reach
from protos.manifest import Index
from protos.plan import Plan
from protos.v1 import site_pb2
from site_agent.config import SiteConfig
from site_agent.home import Home
from site_agent.link import enrolment
from site_agent.link.crew import Crew
from site_agent.link.disclosure import Disclosure
from site_agent.link.doorbell import Doorbell
from site_agent.link.fetcher import Fetcher
from site_agent.link.hello import device_kind, hello_of
from site_agent.link.journal import Journal
from site_agent.link.keys import Keys
from site_agent.link.line import Line
from site_agent.link.outbox import Entry, Outbox, Verdict
from site_agent.link.plans import MOVING, Assignment, OpenPlans, told
from site_agent.link.policy import Policy
from site_agent.link.sender import Sender
from site_agent.link.status import connection, traffic
from site_agent.link.stream import Stream
from site_agent.link.wire import Wire
from site_agent.link.worker import Worker

CERTIFICATE_CHECK_S = 60.0
SHUTDOWN_S = 10.0


class Agent:
    """A running link.

    Args:
        home: The site's folder; its lock must be held.
        config: ``site.toml``.
        echo: Called with every line of the log.
    """

    def __init__(
        self, home: Home, config: SiteConfig, echo: Callable[[dict[str, Any]], None] | None = None
    ) -> None:
        self._home, self._config = home, config
        self._keys = Keys.load(home.keys)
        self.site = self._keys.site
        self._journal = Journal(home.agent_log, self.site, echo)
        self._paused, self._stop = home.paused.exists(), threading.Event()
        self._sources = config.sources(home.root)
        self._disclosure = Disclosure(self.site, config.policy, home.sent_log)
        self._policy = Policy(self.site, config.policy, self._sources)
        self._plans = OpenPlans()
        self.turn = self._plans.turn
        self._outbox = Outbox(home, config.site.keep_states)
        for name in self._outbox.damaged:
            self._journal.error("a damaged contribution is left aside", folder=name)
        self._line = Line(home, config, lambda: self._wire.bulk_address, self._journal)
        self._wire = Wire(lambda: self._keys, config.network, self._line.target)
        spares, keep = home.spares(), config.site.keep_bases
        self._fetcher = Fetcher(self._wire, home.cache, self._policy, keep, spares, self._journal)
        self._worker = Worker(
            site=self.site,
            home=home,
            config=config,
            sources=self._sources,
            policy=self._policy,
            disclosure=self._disclosure,
            fetcher=self._fetcher,
            outbox=self._outbox,
            sign=self._sign,
            ears=self,
            journal=self._journal,
        )
        self._stream = Stream(
            self._wire,
            self._hello,
            self._hear,
            self._attached,
            lambda: self._paused,
            self._disclosure.progress,
            self._journal,
        )
        self._sender = Sender(self._wire, self._stream.say, self._outbox, self, self._journal)
        self._worker.pause(self._paused)
        for mover in (self._fetcher, self._sender):
            mover.allowed(self._line.network.is_open)

    # -- life ------------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until `stop`."""
        doorbell = Doorbell(self._home.socket, self._answer, self._journal)
        crew = Crew(self._journal, self.stop)
        self._journal.info(
            "agent begins",
            orchestrator=self._wire.address,
            certificate_expires=self._keys.expires.isoformat(),
            waiting=len(self._outbox.waiting()),
            **self._line.network.facts(),
        )
        for name, target in (
            ("worker", self._worker.run),
            ("fetcher", self._fetcher.run),
            ("sender", self._sender.run),
            ("stream", self._stream.run),
            ("doorbell", doorbell.run),
            ("line", self._watch_line),
        ):
            crew.start(name, target)
        try:
            while not self._stop.wait(CERTIFICATE_CHECK_S):
                if self._keys.renewal_due():
                    self._renew()
        finally:
            doorbell.close()
            for part in (self._stream, self._worker, self._line, self._fetcher, self._sender):
                part.stop()
            crew.join(SHUTDOWN_S)
            self._journal.info("agent ends")
        if crew.failed:
            raise FarflungError(f"the agent's {crew.failed} failed; log/agent.log has the cause")

    def stop(self) -> None:
        """End; may be called from a signal handler."""
        self._stop.set()

    def reread(self) -> None:
        """Read site.toml again; may be called from a signal handler."""
        self._line.reread()

    def _watch_line(self) -> None:
        def configured(config: SiteConfig) -> None:
            self._policy.apply(config.policy)
            self._disclosure.apply(config.policy)

        def changed() -> None:
            for assignment in self._plans.all():
                if assignment.state in MOVING:
                    self.moved(assignment, assignment.told())

        self._line.run(self._fetcher, self._sender, self._stream, configured, changed)

    # -- the orchestrator's messages ---------------------------------------------------------------

    def _hello(self) -> site_pb2.Hello:
        plans = [a.plan.id for a in self._plans.all()]
        plans += [p for e in self._outbox.waiting() for p in e.plans if p not in plans]
        sources = self._config.sources(self._home.root)
        hello = hello_of(sources, plans, self._paused, self._device())
        self._disclosure.hello(hello)
        return hello

    def _device(self) -> str:
        return device_kind(self._worker.trainer_device or self._config.site.device)

    def _attached(self, welcome: site_pb2.Welcome | None) -> None:
        self._plans.forget_answers()
        if welcome is not None and self._wire.move_bulk(welcome.bulk):
            self._fetcher.reconnect()
            self._sender.reconnect()
        self._sender.attached(welcome)

    def _hear(self, message: site_pb2.ToSite) -> None:
        match message.WhichOneof("kind"):
            case "plan":
                with self.turn:
                    self._offered(message.plan.plan, message.plan.base)
            case "answer":
                self._sender.apply(message.answer)
            case "finish":
                self._finish(message.finish.plan_id)
            case "cancel":
                self._cancelled(message.cancel.plan_id, message.cancel.reason)
            case "drain":
                self._journal.info("the orchestrator is about to end", reason=message.drain.reason)
            case "renew":
                threading.Thread(target=self._renew, name="renew", daemon=True).start()

    def _offered(self, encoded: bytes, base: site_pb2.SmallModel | None = None) -> None:
        try:
            plan = Plan.decode(encoded)
        except FarflungError as error:
            self._journal.error("a plan can't be read", reason=error.message)
            return
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
                self.moved(
                    open_here, open_here.told()
                )  # an orchestrator that comes back asks again
                return True
            self._drop(open_here, "its exchange was opened again, for other work")
        if (outcome := self._plans.outcome(plan)) is not None:
            self._stream.outcome(outcome)
        return outcome is not None or self._plans.answered(plan)

    def _finish(self, plan_id: str) -> None:
        if (assignment := self._plans.get(plan_id)) is not None and not assignment.finishing:
            self._journal.info("the deadline is near: what is done is contributed", plan=plan_id)
            leader = assignment.leader or assignment
            assignment.finishing = leader.finishing = True
            reach("plan.finishing")
            self._worker.finish(leader.plan.id)

    def _cancelled(self, plan_id: str, reason: str) -> None:
        with self.turn:
            if (assignment := self._plans.get(plan_id)) is None:
                return
            self._drop(assignment, reason)
            leader = assignment.leader
            if leader is not None and leader.plan.round < assignment.plan.round:
                self._cancelled(leader.plan.id, reason)  # nobody waits for that work any more

    def _drop(self, assignment: Assignment, reason: str) -> None:
        plan_id = assignment.plan.id
        self._journal.info("plan cancelled", plan=plan_id, reason=reason)
        assignment.cancelled = True
        reach("plan.cancelled")
        self._plans.close(plan_id, again=True)
        self._stream.forget(plan_id)
        self._worker.cancel(plan_id)
        self._hand_on(assignment)

    def _renew(self) -> None:
        try:
            self._keys = enrolment.renew(self._keys, self._wire)
        except FarflungError as error:
            self._journal.error("the certificate can't be renewed", reason=error.message)
            return
        self._journal.info("certificate renewed", expires=self._keys.expires.isoformat())
        for part in (self._fetcher, self._sender, self._stream):
            part.reconnect()

    # -- the parts' messages -----------------------------------------------------------------------

    def _sign(self, folder: Path, header: Header, index: Index) -> Entry:
        entry = self._outbox.admit(folder, header, index, self._keys.key)
        self._disclosure.sent("header", header=header.model_dump(mode="json", exclude={"blocks"}))
        return entry

    def moved(self, assignment: Assignment, progress: site_pb2.Progress) -> None:
        """A plan is in another state, or further, and those that share its work with it."""
        if progress.state in MOVING:
            progress.waits_until = self._line.network.opens
        for one in (assignment, *self._plans.followers(assignment)):
            self._stream.progress(one.note(progress))

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
                self._offered(assignment.plan.encode())

    def unsendable(self, entry: Entry, error: FarflungError) -> None:
        """A contribution's payload is damaged here; it was removed."""
        self._journal.error("a contribution is damaged", contribution=entry.digest)
        with self.turn:
            lost = [a for a in map(self._plans.get, entry.plans) if a is not None]
            for assignment in lost:
                self._fail(assignment, type(error).__name__, self._disclosure.own(error))
            for assignment in lost:
                self._hand_on(assignment)

    # -- the command line ------------------------------------------------------------------------

    def _answer(self, op: str, request: dict[str, Any]) -> dict[str, Any]:
        match op:
            case "status":
                return self._status()
            case "pause" | "resume":
                self._pause(op == "pause")
                return {"paused": self._paused}
            case "leave":
                return self._leave(str(request.get("run", "")))
            case _:
                raise InvalidInput(f"unknown operation {op}")

    def _status(self) -> dict[str, Any]:
        return {
            **connection(self._keys, self._wire, self._stream),
            "paused": self._paused,
            "device": self._device(),
            "tasks": sorted(self._sources),
            "trainer_pid": self._worker.trainer_pid,
            **traffic(self._plans, self._outbox, self._fetcher, self._sender, self._line),
        }

    def _pause(self, paused: bool) -> None:
        self._paused, mark = paused, self._home.paused
        mark.touch() if paused else mark.unlink(missing_ok=True)
        self._worker.pause(paused)
        beat = site_pb2.Heartbeat(sequence=0, paused=paused)
        self._stream.say(site_pb2.FromSite(heartbeat=beat))
        self._journal.info("paused" if paused else "resumed")

    def _leave(self, run: str) -> dict[str, Any]:
        if not run:
            raise InvalidInput("leave: which run?")
        self._stream.say(site_pb2.FromSite(leave=site_pb2.LeaveRun(run=run)))
        for assignment in self._plans.all():
            if assignment.plan.run == run:
                self._cancelled(assignment.plan.id, "this site leaves the run")
        removed = self._outbox.forget_run(run)
        self._home.checkpoint.unlink(missing_ok=True)
        self._journal.info("left a run", run=run, removed=removed)
        return {"run": run, "removed": removed, "told": self._stream.attached}
