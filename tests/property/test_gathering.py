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

    @initialize(n=st.integers(1, 4), every=st.booleans(), data=st.data(), deadline=st.floats(0, 60))
    def begin(self, n: int, every: bool, data: st.DataObject, deadline: float) -> None:
        self.cohort = SITES[:n]
        self.quorum = n if every else data.draw(st.integers(1, n))
        self.deadline, self.now = deadline, 0.0
        self.machine = Gathering(self.quorum, deadline, GRACE, {s: Member() for s in self.cohort})
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

    @rule(site=sites)
    def come_back(self, site: str) -> None:
        self.machine = self.machine.back(site)
        self.away.pop(site, None)

    @rule(by=st.floats(0, 12))
    def wait(self, by: float) -> None:
        self.now += by

    @precondition(lambda self: self.last is not None and self.last.kind == "wait")
    @rule()
    def wait_as_long_as_it_says(self) -> None:
        """Nothing happens before: so the caller may sleep until then, and must not sleep longer."""
        assert self.last is not None
        assert self.now < self.last.wake_at <= self.deadline
        middle = self.machine.decide((self.now + self.last.wake_at) / 2)
        assert middle == self.last or (self.now + self.last.wake_at) / 2 >= self.last.wake_at
        self.now = self.last.wake_at
        assert self.machine.decide(self.now).kind != "wait"

    # -- what must hold -----------------------------------------------------------------------------

    def expected(self) -> Literal["wait", "close", "abandon"]:
        waiting = [s for s in self.cohort if s not in self.counted and s not in self.failures]
        reached = len(self.counted) >= self.quorum
        if len(self.counted) + len(waiting) < self.quorum:
            return "abandon"
        if self.now >= self.deadline:
            return "close" if reached else "abandon"
        if not waiting:
            return "close"
        lapsed = all(s in self.away and self.now >= self.away[s] + GRACE for s in waiting)
        return "close" if reached and lapsed else "wait"

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
            assert self.machine.decide(self.deadline).kind != "wait"


Gatherings.TestCase.settings = settings(max_examples=150, stateful_step_count=25)
TestGatherings = Gatherings.TestCase
