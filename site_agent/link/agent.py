"""The link as a whole: what each part tells the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protos.contribution import Header
from protos.errors import FarflungError, InvalidInput
from protos.manifest import Index
from protos.v1 import site_pb2
from site_agent.config import SiteConfig
from site_agent.home import Home
from site_agent.link import enrolment
from site_agent.link.agenda import Agenda
from site_agent.link.crew import Crew
from site_agent.link.disclosure import Disclosure
from site_agent.link.doorbell import Doorbell
from site_agent.link.fetcher import Fetcher
from site_agent.link.hello import device_kind, hello_of
from site_agent.link.journal import Journal
from site_agent.link.keys import Keys
from site_agent.link.line import Line
from site_agent.link.outbox import Entry, Outbox
from site_agent.link.plans import OpenPlans
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
        self._outbox = Outbox(home, config.site.keep_states)
        for name in self._outbox.damaged:
            self._journal.error("a damaged contribution is left aside", folder=name)
        self._line = Line(home, config, lambda: self._wire.bulk_address, self._journal)
        self._wire = Wire(lambda: self._keys, config.network, self._line.target)
        spares, keep = home.spares(), config.site.keep_bases
        self._fetcher = Fetcher(self._wire, home.cache, self._policy, keep, spares, self._journal)
        self._agenda = Agenda(
            self._plans,
            self._outbox,
            self._policy,
            self._disclosure,
            self._line,
            self._journal,
        )
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
            ears=self._agenda,
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
        self._sender = Sender(
            self._wire, self._stream.say, self._outbox, self._agenda, self._journal
        )
        self._agenda.parts(self._fetcher, self._worker, self._stream, self._sender)
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

        self._line.run(
            self._fetcher, self._sender, self._stream, configured, self._agenda.tell_of_the_line
        )

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
                self._agenda.offered(message.plan.plan, message.plan.base)
            case "answer":
                self._sender.apply(message.answer)
            case "finish":
                self._agenda.finish(message.finish.plan_id)
            case "cancel":
                self._agenda.cancelled(message.cancel.plan_id, message.cancel.reason)
            case "drain":
                self._journal.info("the orchestrator is about to end", reason=message.drain.reason)
            case "renew":
                threading.Thread(target=self._renew, name="renew", daemon=True).start()

    def _renew(self) -> None:
        try:
            self._keys = enrolment.renew(self._keys, self._wire)
        except FarflungError as error:
            self._journal.error("the certificate can't be renewed", reason=error.message)
            return
        self._journal.info("certificate renewed", expires=self._keys.expires.isoformat())
        for part in (self._fetcher, self._sender, self._stream):
            part.reconnect()

    def _sign(self, folder: Path, header: Header, index: Index) -> Entry:
        entry = self._outbox.admit(folder, header, index, self._keys.key)
        self._disclosure.sent("header", header=header.model_dump(mode="json", exclude={"blocks"}))
        return entry

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
                self._agenda.cancelled(assignment.plan.id, "this site leaves the run")
        removed = self._outbox.forget_run(run)
        self._home.checkpoint.unlink(missing_ok=True)
        self._journal.info("left a run", run=run, removed=removed)
        return {"run": run, "removed": removed, "told": self._stream.attached}
