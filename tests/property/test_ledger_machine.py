"""The ledger against a model of it: whatever happens in whatever order, answers are final, each
plan counts at most one contribution, late ones never count, committed rounds never change, and a
token lets in once. Every so often the ledger is opened anew."""

import atexit
import shutil
import tempfile
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from orchestrator.ledger import ContributionRow, Ledger, PlanRow, RoundRow, RunRow
from protos.digest import digest
from protos.errors import Conflict, NotFound, TokenUsed

SITES = ("north", "south")
ROUND_STEPS = ("close", "hold", "abandon", "commit")
AFTER = {"close": "closed", "hold": "held", "abandon": "abandoned", "commit": "committed"}
ALLOWED = {
    "close": {"planned"},
    "hold": {"closed"},
    "abandon": {"planned", "closed", "held"},
    "commit": {"closed", "held"},
}
ENDED = ("abandoned", "committed", "superseded")
MEMORY = Path("/dev/shm")
"""Here nothing is about power cuts: syncing to memory costs nothing."""


class Shared:
    """One ledger for all examples, each with a run and sites of its own: to compile the queries of a
    new ledger takes longer than an example."""

    def __init__(self) -> None:
        self.now = 0.0
        self.example = 0
        self.ledger: Ledger | None = None

    def next(self) -> Ledger:
        self.example += 1
        if self.ledger is None:
            folder = tempfile.mkdtemp(prefix="ledger-", dir=MEMORY if MEMORY.is_dir() else None)
            atexit.register(shutil.rmtree, folder)
            self.path = Path(folder) / "ledger.sqlite"
            self.ledger = self.open()
            atexit.register(self.ledger.close)
        return self.ledger

    def open(self) -> Ledger:
        return Ledger.open(self.path, lambda: self.now)


SHARED = Shared()


@dataclass
class Attempt:
    """What the model knows of one attempt."""

    plans: dict[str, PlanRow]
    state: str = "planned"
    counted: dict[str, str] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    row: RoundRow | None = None  # as it was when it ended


class RoundsMachine(RuleBasedStateMachine):
    sent = Bundle("sent")

    @initialize()
    def begin(self) -> None:
        self.ledger = SHARED.next()
        self.id = f"r{SHARED.example}"
        self.sites = tuple(f"{site}-{SHARED.example}" for site in SITES)
        self.ledger.create_run(RunRow(self.id, f"run {self.id}", {}, digest(b"{}"), 100, 0.0))
        self.attempts: dict[tuple[int, int], Attempt] = {}
        self.verdicts: dict[str, str] = {}
        self.late: set[str] = set()

    @rule(
        number=st.integers(1, 2),
        sites=st.sets(st.integers(0, 1), min_size=1),
        work=st.sampled_from("aab"),
        instead=st.booleans(),
    )
    def plan(self, number: int, sites: set[int], work: str, instead: bool) -> None:
        earlier = [attempt for (n, attempt) in self.attempts if n == number]
        key = (number, len(earlier) + 1)
        plans = {
            site: PlanRow(
                self.id, *key, "train", site, b"plan", digest(f"{number}{site}{work}".encode())
            )
            for site in (self.sites[position] for position in sites)
        }
        under_way = [
            at
            for at, one in self.attempts.items()
            if one.state not in ENDED and not (instead and at[0] == number)
        ]
        done = [n for (n, _), one in self.attempts.items() if one.state == "committed"]
        possible = not under_way and number > max(done, default=0)
        try:
            self.ledger.plan_round(
                RoundRow(self.id, *key, started=SHARED.now),
                list(plans.values()),
                abandoning="another attempt" if instead else "",
            )
        except Conflict:
            assert not possible
            return
        assert possible
        for at, one in self.attempts.items():
            if at[0] == number and one.state not in ENDED:
                self._ended(at, "abandoned")
        self.attempts[key] = Attempt(plans)

    @rule(step=st.sampled_from(ROUND_STEPS), data=st.data())
    @precondition(lambda self: self.attempts)
    def move(self, step: str, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.attempts)))
        attempt = self.attempts[key]
        try:
            if step == "close":
                row = self.ledger.close_round(self.id, *key, None, "why")
                expected = tuple(attempt.counted[site] for site in sorted(attempt.counted))
                assert row.closed_set == expected
            elif step == "hold":
                self.ledger.hold_round(self.id, *key, "why", model="candidate")
            elif step == "abandon":
                self.ledger.abandon_round(self.id, *key, "why")
            else:
                self.ledger.commit_round(self.id, *key, model=f"model {key}")
                assert self.ledger.run(self.id).model == f"model {key}"
        except Conflict:
            assert attempt.state not in ALLOWED[step]
            return
        assert attempt.state in ALLOWED[step]
        self._ended(key, AFTER[step])

    @rule(number=st.integers(1, 2))
    def roll_back(self, number: int) -> None:
        done = {n for (n, _), one in self.attempts.items() if one.state == "committed"}
        possible = number in done and max(done) > number
        self.ledger.set_run(self.id, state="stopped")
        try:
            target = self.ledger.roll_back(self.id, number, "why")
        except Conflict:
            assert not possible
            return
        assert possible
        assert self.ledger.run(self.id).model == target.model
        for key, one in self.attempts.items():
            if one.state not in ENDED:
                self._ended(key, "abandoned")
            held = one.row is not None and one.row.model != ""
            if key[0] > number and (one.state == "committed" or held):
                self._ended(key, "superseded")

    def _ended(self, key: tuple[int, int], state: str) -> None:
        attempt = self.attempts[key]
        attempt.state = state
        if state in ENDED:
            attempt.row = self.ledger.round(self.id, *key)

    # ----------------------------------------------------------------------- contributions

    @rule(target=sent, data=st.data(), text=st.sampled_from("xy"))
    @precondition(lambda self: self.attempts)
    def train_and_send(self, data: st.DataObject, text: str) -> ContributionRow:
        attempt = self.attempts[data.draw(st.sampled_from(sorted(self.attempts)))]
        plan = attempt.plans[data.draw(st.sampled_from(sorted(attempt.plans)))]
        header = f"{plan.id} {plan.site} {text}".encode()
        row = ContributionRow(
            digest(header), plan.id, self.id, plan.round, plan.attempt, "train", plan.site,
            plan.work_digest, header, b"signed", "f", "i", "m", 1, None, SHARED.now,
        )  # fmt: skip
        self._send(row)
        return row

    @rule(row=sent)
    def send_again(self, row: ContributionRow) -> None:
        self._send(row)

    def _send(self, row: ContributionRow) -> None:
        answer = self.ledger.accept(row)
        if row.digest in self.verdicts:
            assert answer.again
            assert answer.verdict == self.verdicts[row.digest], "an answer is final"
            return
        own = self.attempts[row.round, row.attempt]
        target = own
        if own.state != "planned":
            target = next(
                (
                    one
                    for (number, _), one in self.attempts.items()
                    if number == row.round
                    and one.state == "planned"
                    and row.site in one.plans
                    and one.plans[row.site].work_digest == row.work_digest
                ),
                own,
            )
        standing = target.answers.get(row.site, "")
        if standing in ("counted", "refused") or (target.state == "planned" and standing == "late"):
            assert answer.verdict == "refused"
            return
        if target.state == "planned":
            assert answer.verdict == "counted"
            assert answer.plan_id == target.plans[row.site].id
            target.counted[row.site] = row.digest
            target.answers[row.site] = "counted"
        else:
            assert answer.verdict == "late"
            own.answers[row.site] = "late"
            self.late.add(row.digest)
        self.verdicts[row.digest] = answer.verdict

    @rule(data=st.data(), how=st.sampled_from(["failed", "left", "refused"]))
    @precondition(lambda self: self.attempts)
    def give_up(self, data: st.DataObject, how: str) -> None:
        attempt = self.attempts[data.draw(st.sampled_from(sorted(self.attempts)))]
        site = data.draw(st.sampled_from(sorted(attempt.plans)))
        row = self.ledger.answer_plan(attempt.plans[site].id, site, how)  # type: ignore[arg-type]
        assert row.answer == attempt.answers.setdefault(site, how)

    @rule(data=st.data())
    @precondition(lambda self: self.attempts)
    def carry_over(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.attempts)))
        attempt = self.attempts[key]
        carried = {row.site: row for row in self.ledger.carry_over(self.id, *key)}
        if attempt.state != "planned":
            assert carried == {}
        for site, row in carried.items():
            assert attempt.answers.get(site, "") == ""
            assert row.work_digest == attempt.plans[site].work_digest
            assert row.digest not in self.late
            assert row.digest not in self._taken_back()
            attempt.counted[site] = row.digest
            attempt.answers[site] = "counted"

    def _taken_back(self) -> set[str]:
        gone = [one for one in self.attempts.values() if one.state == "superseded"]
        return {name for one in gone for name in one.counted.values()}

    @invariant()
    def what_counts_is_what_was_counted(self) -> None:
        if not hasattr(self, "ledger"):
            return
        known = {(row.round, row.attempt): row for row in self.ledger.rounds(self.id, True)}
        assert known.keys() == self.attempts.keys()
        for key, attempt in self.attempts.items():
            assert known[key].state == attempt.state
            rows = {row.site: row.digest for row in self.ledger.contributions(self.id, *key)}
            assert rows == attempt.counted
            assert not self.late & set(rows.values())
            if attempt.row is not None:
                assert known[key] == attempt.row, "what has ended has changed"
        done = [number for (number, _), row in known.items() if row.state == "committed"]
        assert done == sorted(set(done)), "a round was committed twice"

    @invariant()
    def open_plans_are_those_without_an_answer(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for site in self.sites:
            expected = {
                attempt.plans[site].id
                for attempt in self.attempts.values()
                if attempt.state == "planned"
                and site in attempt.plans
                and site not in attempt.answers
            }
            assert {plan.id for plan in self.ledger.open_plans(site)} == expected

    def teardown(self) -> None:
        if hasattr(self, "ledger") and SHARED.example % 10 == 0:
            with closing(SHARED.open()) as self.ledger:  # what a restart finds
                self.what_counts_is_what_was_counted()
                self.open_plans_are_those_without_an_answer()
                self.ledger.verify_entries(self.id)


class SitesMachine(RuleBasedStateMachine):
    tokens = Bundle("tokens")

    @initialize()
    def begin(self) -> None:
        self.ledger = SHARED.next()
        self.sites = tuple(f"{site}-{SHARED.example}" for site in SITES)
        self.id = SHARED.example
        self.allowed: dict[str, str] = {}
        self.open_tokens: dict[str, str] = {}
        self.spent = 0

    @rule(target=tokens, position=st.integers(0, 1), life=st.integers(1, 20))
    def invite(self, position: int, life: int) -> tuple[str, str, float]:
        self.spent += 1
        site, token = self.sites[position], f"token {self.id} {self.spent}"
        self.ledger.invite(site, token, SHARED.now + life)
        self.open_tokens = {t: s for t, s in self.open_tokens.items() if s != site}
        self.open_tokens[token] = site
        return token, site, SHARED.now + life

    @rule(token=tokens)
    def enrol(self, token: tuple[str, str, float]) -> None:
        name, site, expires = token
        self.spent += 1
        fingerprint = f"certificate {self.id} {self.spent}"
        possible = self.open_tokens.get(name) == site and SHARED.now < expires
        try:
            found = self.ledger.use_token(
                name, fingerprint=fingerprint, certificate_pem=b"", expires=1e9
            )
        except TokenUsed:
            assert not possible
            return
        assert possible
        assert found == site
        del self.open_tokens[name]
        self.allowed = {f: s for f, s in self.allowed.items() if s != site}
        self.allowed[fingerprint] = site

    @rule(position=st.integers(0, 1))
    def revoke(self, position: int) -> None:
        site = self.sites[position]
        try:
            self.ledger.revoke(site)
        except NotFound:
            assert site not in self.allowed.values()
            return
        self.open_tokens = {t: s for t, s in self.open_tokens.items() if s != site}
        self.allowed = {f: s for f, s in self.allowed.items() if s != site}

    @rule()
    def time_passes(self) -> None:
        SHARED.now += 5

    @invariant()
    def only_those_are_let_in_who_enrolled(self) -> None:
        if not hasattr(self, "ledger"):
            return
        for number in range(self.spent + 1):
            fingerprint = f"certificate {self.id} {number}"
            assert self.ledger.allowed(fingerprint) == self.allowed.get(fingerprint)


pytestmark = pytest.mark.timeout(300)
TestRounds = RoundsMachine.TestCase
TestRounds.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestSites = SitesMachine.TestCase
TestSites.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
