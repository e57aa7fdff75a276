"""The gathering machine under any sequence of events, against a plain model of what must hold."""

from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orchestrator.gathering import Decision, Gathering, Member

GRACE = 10.0
SITES = ("a", "b", "c", "d")
sites = st.sampled_from([*SITES, "stranger"])


class Gatherings(RuleBasedStateMachine):
    """Events in any order; time only moves on. The model is kept by the words of the page."""

    @initialize(
        n=st.integers(1, 4),
        every=st.booleans(),
        data=st.data(),
        deadline=st.floats(0, 60),
        patience=st.sampled_from([0.0, 20.0]),
        lead=st.sampled_from([None, 0.0, 7.0]),
    )
    def begin(
        self,
        n: int,
        every: bool,
        data: st.DataObject,
        deadline: float,
        patience: float,
        lead: float | None,
    ) -> None:
        self.cohort = SITES[:n]
        self.quorum = n if every else data.draw(st.integers(1, n))
        self.deadline, self.now = deadline, 0.0
        members = {s: Member(lead_s=lead) for s in self.cohort}
        self.machine = Gathering(self.quorum, deadline, GRACE, members, patience)
        self.patience, self.lead = patience, lead
        self.prepared = dict.fromkeys(self.cohort, 0.0)
        self.preparing: set[str] = set()
        self.told: dict[str, int] = {}
        self.counted: set[str] = set()
        self.failures: dict[str, str] = {}
        self.away: dict[str, float] = {}
        self.last: Decision | None = None

    # -- events -----------------------------------------------------------------------------------

    @rule(site=sites)
    def count(self, site: str) -> None:
        before = self.machine
        self.machine = self.machine.counted(site)
        if site in self.cohort:
            self.counted.add(site)
            self.failures.pop(site, None)
            assert self.machine.counted(site) == self.machine
        else:
            assert self.machine == before

    @rule(site=sites, reason=st.sampled_from(["refused", "killed", "policy"]))
    def fail(self, site: str, reason: str) -> None:
        self.machine = self.machine.failed(site, reason)
        if site in self.cohort and site not in self.counted:
            self.failures[site] = reason

    @rule(site=sites)
    def go(self, site: str) -> None:
        self.machine = self.machine.gone(site, self.now)
        if site in self.cohort:
            self.away.setdefault(site, self.now)
            self.preparing.discard(site)

    @rule(site=sites)
    def come_back(self, site: str) -> None:
        self.machine = self.machine.back(site)
        self.away.pop(site, None)
        self.told.pop(site, None)

    @rule(site=sites, still=st.booleans())
    def prepare(self, site: str, still: bool) -> None:
        self.machine = self.machine.prepares(site, self.now, still)
        if still and site in self.cohort and site not in self.away:
            self.preparing.add(site)
        else:
            self.preparing.discard(site)

    @rule()
    def tell(self) -> None:
        """What the caller does with the sites that are to finish; never twice while they stay."""
        decision = self.machine.decide(self.now)
        for site in decision.finish:
            assert site not in self.told
            assert site not in self.away
            self.told[site] = 1
        self.machine = self.machine.told(decision.finish)
        assert self.machine.decide(self.now).finish == ()
        assert self.machine.decide(self.now).kind == decision.kind

    @rule(by=st.floats(0, 12))
    def wait(self, by: float) -> None:
        self.pass_until(self.now + by)

    def pass_until(self, then: float) -> None:
        for site in self.preparing:
            self.prepared[site] += then - self.now
        self.now = then

    @precondition(lambda self: self.last is not None and self.last.kind == "wait")
    @rule()
    def wait_as_long_as_it_says(self) -> None:
        """Nothing happens before: so the caller may sleep until then, and must not sleep longer."""
        assert self.last is not None
        assert self.now < self.last.wake_at <= self.deadline + self.patience
        middle = self.machine.decide((self.now + self.last.wake_at) / 2)
        assert middle == self.last or (self.now + self.last.wake_at) / 2 >= self.last.wake_at
        self.pass_until(self.last.wake_at)

    # -- what must hold -----------------------------------------------------------------------------

    def expected(self) -> Literal["wait", "close", "abandon"]:
        waiting = [s for s in self.cohort if s not in self.counted and s not in self.failures]
        reached = len(self.counted) >= self.quorum
        if len(self.counted) + len(waiting) < self.quorum:
            return "abandon"
        if not waiting:
            return "close"
        awaited = [s for s in waiting if self.now < self.end_of(s)]
        if not awaited:
            return "close" if reached else "abandon"
        lapsed = all(s in self.away and self.now >= self.away[s] + GRACE for s in awaited)
        return "close" if reached and lapsed else "wait"

    def end_of(self, site: str) -> float:
        return self.deadline + min(self.patience, self.prepared[site])

    @invariant()
    def decides_as_the_page_says(self) -> None:
        if not hasattr(self, "machine"):
            return
        self.last = self.machine.decide(self.now)
        assert self.last.kind == self.expected()
        assert self.machine.decide(self.now) == self.last

    @invariant()
    def never_closes_below_the_quorum(self) -> None:
        if hasattr(self, "machine") and self.machine.decide(self.now).kind == "close":
            assert len(self.machine.counted_sites) >= self.quorum

    @invariant()
    def every_site_is_counted_or_missing_exactly_once(self) -> None:
        if not hasattr(self, "machine"):
            return
        assert self.machine.counted_sites == tuple(sorted(self.counted))
        assert set(self.machine.missing) == set(self.cohort) - self.counted
        assert {s: self.machine.missing[s] for s in self.failures} == self.failures

    @invariant()
    def it_always_ends(self) -> None:
        if hasattr(self, "machine"):
            assert self.machine.decide(self.deadline + self.patience).kind != "wait"


Gatherings.TestCase.settings = settings(max_examples=150, stateful_step_count=25)
TestGatherings = Gatherings.TestCase
