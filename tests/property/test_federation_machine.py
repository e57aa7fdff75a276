"""Orchestrator and sites under any interleaving of loss, duplication, delay, restart and late answers.

Real on both ends: ledger, store, intake, reception, sessions, exchange and gathering there; outbox and
signed headers here. What lies between them, and when somebody dies, Hypothesis decides. What has to hold:

- every acknowledged contribution counts exactly once, for the plan that the acknowledgement names;
- no round closes below its quorum, and none changes once it is committed;
- the answer to a contribution is final, and only an answer empties an outbox;
- nothing is trained twice unless what was trained first was refused or too late;
- work for an earlier round counts only where the run allows it, in place of work that is not begun;
- once everything gets through, everybody has an answer.
"""

import atexit
import shutil
import tempfile
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.blocks import Blocks
from orchestrator.exchange import Exchange, Gathered
from orchestrator.intake import Intake
from orchestrator.ledger import RoundRow
from orchestrator.reception import Reception
from orchestrator.recorder import LedgerRecorder
from orchestrator.rounds.gather import Closed, gather
from orchestrator.rounds.plan import plan_row
from orchestrator.run_config import RunConfig
from orchestrator.sessions import Session, Sessions
from protos.chunks import IndexWriter
from protos.contribution import Header
from protos.errors import FarflungError
from protos.identity import certificate_pem
from protos.manifest import Manifest
from protos.plan import Plan, Schedule, TaskChoice, Work, round_of
from protos.v1 import common_pb2, site_pb2
from site_agent.home import Home
from site_agent.link.outbox import Entry, Outbox
from site_agent.link.plans import OpenPlans, order_of
from site_agent.link.sender import VERDICTS
from tests.support.authority import Authority
from tests.support.contributor import Contributor
from tests.support.workbench import Workbench, of_spec

MANIFEST = Manifest((of_spec("w", (2,)),))
NAMES = ("east", "north", "south")
ROUNDS, LONG_S, LIMIT_S = 3, 1e5, 60.0
MEMORY = Path("/dev/shm")
"""Here nothing is about power cuts: syncing to memory costs nothing."""

which = st.integers(0, 2)
any_of_them = st.integers(0, 1000)


@cache
def shared() -> tuple[Workbench, Authority]:
    """One orchestrator's folder for all examples, each with a run and sites of its own."""
    root = tempfile.mkdtemp(prefix="federation-", dir=MEMORY if MEMORY.is_dir() else None)
    bench = Workbench(Path(root))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    atexit.register(bench.close)
    return bench, Authority("f-machine")


class Site:
    """A site: its keys, its outbox, and the control stream that it may have."""

    def __init__(self, bench: Workbench, authority: Authority, name: str) -> None:
        self.name = name
        self.identity = Contributor(authority, name)
        caller = self.identity.caller
        bench.ledger.invite(name, f"token of {name}", 4e9)
        bench.ledger.use_token(
            f"token of {name}",
            fingerprint=caller.fingerprint,
            certificate_pem=certificate_pem(caller.certificate),
            expires=4e9,
        )
        self.home = Home(bench.home.path.parent / "sites" / name)
        self.home.create()
        self.outbox = Outbox(self.home)
        self.trained: Counter[str] = Counter()
        self.wasted: Counter[str] = Counter()
        self.answers: dict[str, str] = {}
        self.plans = OpenPlans()
        self.failed: set[str] = set()
        self.session: Session | None = None

    def hear(self, plan: Plan) -> None:
        """A plan was offered, perhaps not for the first time."""
        if self.plans.answered(plan) or plan.id in self.failed:
            return  # this offer was sent before the answer, or it says again how it ended
        finished = self.outbox.of_work(plan.work_digest) or self.outbox.for_earlier(plan)
        if finished is None:
            self._train(plan)
        elif plan.id not in finished.plans:
            finished.plans.append(plan.id)

    def _train(self, plan: Plan) -> None:
        made = self.home.work / f"job-{self.trained.total()}"
        made.mkdir()
        update = torch.tensor([float(plan.round), float(len(self.name))])
        writer = IndexWriter(made / "payload")
        writer.write(self.identity.payload(MANIFEST, {"w": update}))
        index = writer.finish(MANIFEST.digest)
        (made / "state.safetensors").write_bytes(b"what it remembers")
        header = Header(
            plan_id=plan.id, work_digest=plan.work_digest, site=self.name, kind=plan.kind,
            base=plan.base, manifest=MANIFEST.digest, index=index.digest, examples=5,
        )  # fmt: skip
        self.outbox.admit(made, header, index, self.identity.key)
        self.trained[plan.work_digest] += 1

    def answered(self, answer: common_pb2.Answer) -> None:
        """An answer came, perhaps not for the first time; as `Sender` takes it."""
        verdict = VERDICTS.get(answer.verdict)
        if verdict is not None and answer.contribution:
            first = self.answers.setdefault(answer.contribution, verdict)
            assert first == verdict, "an answer is final"
        entry = self.outbox.find(answer.contribution, answer.plan_id)
        if entry is None or verdict is None:
            return
        self.outbox.answer(entry, verdict)
        # An answer for one attempt, or round, says that those before it are over.
        before = [p for p in entry.plans if order_of(p) < order_of(answer.plan_id)]
        for plan_id in (*before, answer.plan_id):
            self.plans.close(plan_id)
        if verdict != "counted":
            self.wasted[entry.header.work_digest] += 1

    def restart(self) -> None:
        """Its process was killed: what is in its folder is left."""
        self.outbox = Outbox(self.home)
        self.failed.clear()
        assert not self.outbox.damaged


@dataclass
class Message:
    """Something on its way: a contribution, or an answer to one."""

    site: Site
    head: site_pb2.ContributionHead | None = None
    data: bytes = b""
    answer: common_pb2.Answer | None = None


class FederationMachine(RuleBasedStateMachine):
    examples = 0

    @initialize(quorum=st.sampled_from((1, 1, 2, 2, 3)), stale=st.sampled_from((0, 1, 2)))
    def begin(self, quorum: int, stale: int) -> None:
        self.bench, authority = shared()
        type(self).examples += 1
        self.run_id, self.quorum, self.stale = f"r{self.examples}", quorum, stale
        row = self.bench.run(self.run_id, cohort=f"{{ quorum = {quorum}, stale = {stale} }}")
        self.config = RunConfig.from_resolved(row.config)
        self.bench.ledger.set_run(self.run_id, state="running")
        names = [f"{name}-{self.examples}" for name in NAMES]
        self.sites = [Site(self.bench, authority, name) for name in names]
        self.base = self.bench.put_model(MANIFEST, {"w": torch.zeros(2)})
        self.number = self.attempt = 0
        self.row: RoundRow | None = None  # of the attempt under way
        self.ended: dict[tuple[int, int], RoundRow] = {}
        self.acknowledged: dict[str, set[str]] = defaultdict(set)  # plans, by contribution
        self.flying: list[Message] = []
        self._start()
        self._next_round()

    def _start(self) -> None:
        """What a daemon makes anew at its start."""
        bench = self.bench
        exchange = Exchange(bench.ledger, bench.board, 1e6, lambda level, site, text: None)
        self.engine = replace(bench.engine, exchange=exchange)
        self.sessions = Sessions(1e6, exchange.attached, exchange.gone)
        exchange.sessions = self.sessions
        recorder = LedgerRecorder(bench.ledger, exchange)
        intake = Intake(bench.ledger, bench.store, bench.home.spool, recorder, Blocks(self.engine))
        self.reception = Reception(bench.ledger, intake, recorder)
        for site in self.sites:
            site.session = None

    # -- the orchestrator ---------------------------------------------------------------------------

    def _next_round(self) -> None:
        self.number, self.attempt, self.row = self.number + 1, 0, None
        if self.number <= ROUNDS:
            self._plan("")

    def _plan(self, abandoning: str) -> None:
        self.attempt += 1
        older = self.bench.ledger.newest(self.run_id, self.stale)
        accepts = (self.base, *(row.base for row in older))
        plans = [
            Plan(
                run=self.run_id, round=self.number, attempt=self.attempt, site=site.name,
                base=self.base, manifest=MANIFEST.digest, accepts=accepts,
                task=TaskChoice(name="t"), work=Work(steps=1), schedule=Schedule(lr=0.1),
            )
            for site in self.sites
        ]  # fmt: skip
        row = RoundRow(
            self.run_id, self.number, self.attempt, base=self.base, quorum=self.quorum,
            started=time.time(), deadline_s=LONG_S,
        )  # fmt: skip
        ledger = self.bench.ledger
        ledger.plan_round(row, [plan_row(p) for p in plans], abandoning=abandoning)
        self.row = ledger.round(self.run_id, self.number, self.attempt)
        for carried in ledger.carry_over(self.run_id, self.number, self.attempt):
            self.acknowledged[carried.digest].add(self._plan_id())

    def _plan_id(self) -> str:
        return f"{self.run_id}/{self.number}/{self.attempt}/train"

    @rule(late=st.booleans(), picks=st.lists(st.tuples(any_of_them, st.booleans()), max_size=6))
    @precondition(lambda self: self.row is not None)
    def gather_for_a_while(self, late: bool, picks: list[tuple[int, bool]]) -> None:
        """The round's thread listens while some messages arrive; then it is interrupted."""
        assert self.row is not None
        row = replace(self.row, started=0.0) if late else self.row
        planned = replace(self.bench.planned(self.base), row=row, config=self.config)
        found: list[Closed | Gathered] = []
        thread = threading.Thread(target=lambda: found.append(gather(self.engine, planned)))
        thread.start()
        for pick, again in picks:
            self._arrive(pick, again)
        self.engine.exchange.interrupt()
        thread.join(LIMIT_S)
        assert found, "the round's thread hangs"
        self._concluded(found[0])

    def _concluded(self, how: Closed | Gathered) -> None:
        if isinstance(how, Gathered) and how.interrupted:
            return
        # Whether or not it was used up: the next wait is not to end by it.
        self.engine.exchange._interrupt.clear()
        if isinstance(how, Gathered):
            assert how.decision.kind == "abandon"
            self._plan(how.decision.reason)
            return
        ledger, key = self.bench.ledger, (self.run_id, self.number, self.attempt)
        inside = {c.site: c.digest for c in how.contributions}
        assert len(inside) == len(how.contributions) >= self.quorum
        told = {c for c, plans in self.acknowledged.items() if self._plan_id() in plans}
        assert told == set(inside.values()), "what was acknowledged is what counts"
        for row in how.contributions:
            (site,) = (s for s in self.sites if s.name == row.site)
            asked = round_of(row.plan_id)
            sent = site.identity.payload(
                MANIFEST, {"w": torch.tensor([float(asked), float(len(site.name))])}
            )
            assert self.bench.bytes_of(row.index) == sent
            assert 0 <= self.number - asked <= self.stale
            if asked != self.number:
                own = ledger.plan(self._plan_id(), site.name)
                assert own is not None
                assert site.trained[own.work_digest] == 0, "it was done in place of this"
        self.base = self.bench.put_model(
            MANIFEST, {"w": torch.tensor([self.number, self.examples]).float()}
        )
        self.ended[self.number, self.attempt] = ledger.commit_round(*key, model=self.base)
        self._next_round()

    @rule()
    def the_daemon_is_killed(self) -> None:
        self.sessions.drain("killed")
        self.flying.clear()
        self._start()

    # -- sites ----------------------------------------------------------------------------------------

    @rule(i=which)
    def attach(self, i: int) -> None:
        site = self.sites[i]
        site.plans.forget_answers()
        site.session = Session(site.name, site.identity.caller.fingerprint, site_pb2.Hello())
        self.sessions.attach(site.session)
        for row in self.bench.ledger.open_plans(site.name):
            site.session.send(site_pb2.ToSite(plan=site_pb2.PlanOffer(plan=row.plan)))

    @rule(i=which)
    def the_stream_breaks(self, i: int) -> None:
        site = self.sites[i]
        if site.session is not None:
            self.sessions.detach(site.session)
            site.session = None

    @rule(i=which)
    def a_site_is_killed(self, i: int) -> None:
        self.the_stream_breaks(i)
        self.flying = [m for m in self.flying if m.site is not self.sites[i] or m.answer is None]
        self.sites[i].restart()

    @rule(which=st.sets(which, min_size=1), arrives=st.booleans())
    def work(self, which: set[int], arrives: bool) -> None:
        """Some sites do all that is asked of them; it may arrive, and the answers are on their way."""
        for i in which:
            if self.sites[i].session is None:
                self.attach(i)
            self.hear_what_was_pushed(i)
            self.send(i)
            if arrives:
                self._arrive(len(self.flying) - 1, again=False)

    @rule(i=which)
    @precondition(lambda self: self.row is not None and self.quorum < len(NAMES))
    def a_round_goes_by_without(self, i: int) -> None:
        """A site is too slow: it has done its work, and nothing of it arrived at the deadline."""
        self.attach(i)
        self.hear_what_was_pushed(i)
        self.work({0, 1, 2} - {i}, arrives=True)
        self.gather_for_a_while(late=True, picks=[])

    @rule(i=which)
    def hear_what_was_pushed(self, i: int) -> None:
        site = self.sites[i]
        if site.session is None:
            return
        site.session.end()
        for message in site.session.outgoing():
            if message.WhichOneof("kind") == "plan":
                site.hear(Plan.decode(message.plan.plan))

    @rule(i=which)
    def fail(self, i: int) -> None:
        """The trainer died, say; what `ControlService` does when it hears of it."""
        site = self.sites[i]
        for row in self.bench.ledger.open_plans(site.name):
            plan = Plan.decode(row.plan)
            if not (site.outbox.of_work(row.work_digest) or site.outbox.for_earlier(plan)):
                site.failed.add(row.id)
                self.bench.ledger.answer_plan(row.id, site.name, "failed", "TaskFailed", "it died")
                self.engine.exchange.failed(site.name, row.id, "TaskFailed", "it died", "failed")

    @rule(i=which)
    def send(self, i: int) -> None:
        for entry in self.sites[i].outbox.waiting():
            self.flying.append(self._message(self.sites[i], entry))

    def _message(self, site: Site, entry: Entry) -> Message:
        head = site_pb2.ContributionHead(
            header=entry.encoded, signature=entry.signature, index=entry.index.encoded
        )
        return Message(site, head, entry.payload.read_bytes())

    # -- what lies between ------------------------------------------------------------------------------

    @rule(picks=st.lists(st.tuples(any_of_them, st.booleans()), min_size=1, max_size=8))
    @precondition(lambda self: self.flying)
    def arrive(self, picks: list[tuple[int, bool]]) -> None:
        """Messages arrive, in whatever order; perhaps once more later."""
        for pick, again in picks:
            self._arrive(pick, again)

    @rule(pick=any_of_them)
    @precondition(lambda self: self.flying)
    def get_lost(self, pick: int) -> None:
        self.flying.pop(pick % len(self.flying))

    def _arrive(self, pick: int, again: bool) -> None:
        if not self.flying:
            return
        at = pick % len(self.flying)
        message = self.flying[at] if again else self.flying.pop(at)
        if message.answer is not None:
            message.site.answered(message.answer)
            return
        assert message.head is not None
        try:
            answer = self.reception.take_whole(
                message.site.identity.caller, message.head, message.data
            )
        except FarflungError:
            return  # without a verdict: it is sent again
        if answer.verdict == common_pb2.Answer.COUNTED:
            # Work that was carried into another attempt counts for that one too.
            self.acknowledged[answer.contribution].add(answer.plan_id)
        self.flying.append(Message(message.site, answer=answer))

    # -- what holds -------------------------------------------------------------------------------------

    @invariant()
    def nothing_counts_twice_or_changes(self) -> None:
        if not hasattr(self, "sites"):
            return
        ledger, seen = self.bench.ledger, Counter[str]()
        for (number, attempt), row in self.ended.items():
            assert ledger.round(self.run_id, number, attempt) == row
            inside = [c.digest for c in ledger.contributions(self.run_id, number, attempt)]
            assert sorted(row.closed_set) == sorted(inside)
            seen.update(inside)
        assert max(seen.values(), default=1) == 1

    @invariant()
    def nothing_is_trained_in_vain(self) -> None:
        for site in getattr(self, "sites", ()):
            for work, often in site.trained.items():
                assert often <= 1 + site.wasted[work]

    def teardown(self) -> None:
        if not hasattr(self, "sites"):
            return
        try:
            self._let_everything_through()
        finally:
            self.sessions.drain("the end")

    def _let_everything_through(self) -> None:
        for _ in range(3):
            for i, site in enumerate(self.sites):
                self.attach(i)
                self.hear_what_was_pushed(i)
                self.send(i)
                site.session = None
            while self.flying:
                self._arrive(0, again=False)
        for site in self.sites:
            assert site.outbox.waiting() == [], "somebody has no answer"
        if self.row is not None:
            self.gather_for_a_while(late=True, picks=[])
        self.nothing_counts_twice_or_changes()
        self.bench.ledger.verify_entries(self.run_id)


pytestmark = pytest.mark.timeout(300)
TestFederation = FederationMachine.TestCase
TestFederation.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
