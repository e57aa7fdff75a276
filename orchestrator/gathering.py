"""When does a round close? A pure state machine: events in, decisions out, no clock, no socket.

A site is *open* until it has an answer: counted, or failed (its contribution was refused, its
trainer died, its policy said no). The exchange closes when every site has an answer; or when the
quorum is counted and every open site has been gone longer than the grace; or at the deadline. It is
given up as soon as the quorum can't be reached any more, or at the deadline below it. A quorum of
all sites therefore waits for the deadline for a site that is gone, since it may come back.

The time that a site spends preparing does not run against it: its own deadline is so much later, up to
a bound, and the exchange's is the latest one of the sites that are open. Where partial work is taken, a
site is told to finish a while before its own deadline, once each time that it attaches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Status = Literal["open", "counted", "failed"]


@dataclass(frozen=True)
class Member:
    """One site of the cohort in this exchange.

    Attributes:
        status: open, counted or failed.
        gone_since: When its stream broke; None while it is attached.
        reason: Why it failed; or, of one that is open, what is known of why it did not answer.
        prepared_s: Seconds that it has spent preparing, without the stretch under way.
        preparing_since: When that began; None while it does something else.
        lead_s: How long before its deadline it is told to finish; None for not at all.
        finishing: It was told.
    """

    status: Status = "open"
    gone_since: float | None = None
    reason: str = ""
    prepared_s: float = 0.0
    preparing_since: float | None = None
    lead_s: float | None = None
    finishing: bool = False

    def prepared(self, now: float) -> float:
        """Seconds that it has spent preparing."""
        since = self.preparing_since
        return self.prepared_s + (0.0 if since is None else max(0.0, now - since))


@dataclass(frozen=True)
class Decision:
    """What follows from the events so far.

    Attributes:
        kind: wait, close or abandon.
        reason: In words.
        wake_at: For wait: when to look again, even if nothing happens.
        finish: For wait: sites that are to be told now to finish.
    """

    kind: Literal["wait", "close", "abandon"]
    reason: str = ""
    wake_at: float = float("inf")
    finish: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gathering:
    """The exchange of one attempt.

    Attributes:
        quorum: How many sites must be counted.
        deadline: When it ends, on the caller's clock.
        grace: Seconds that a closed quorum waits for a site that is gone.
        members: The cohort.
        patience: Seconds of preparing, at most, that do not run against a site.
    """

    quorum: int
    deadline: float
    grace: float
    members: Mapping[str, Member] = field(default_factory=dict)
    patience: float = 0.0

    # -- events -------------------------------------------------------------------------------

    def counted(self, site: str) -> Gathering:
        """A contribution of the site is durable. It stays counted whatever comes later."""
        return self._with(site, status="counted", reason="")

    def failed(self, site: str, reason: str) -> Gathering:
        """The site answered that there will be no contribution, or it was refused."""
        if self._member(site).status == "counted":
            return self
        return self._with(site, status="failed", reason=reason)

    def gone(self, site: str, now: float) -> Gathering:
        """The site's stream broke or its heartbeat lapsed."""
        member = self._member(site)
        if member.gone_since is not None:
            return self
        prepared = {"prepared_s": member.prepared(now), "preparing_since": None}
        return self._with(site, gone_since=now, **prepared)

    def back(self, site: str) -> Gathering:
        """The site is attached again. It may have forgotten that it was told to finish."""
        return self._with(site, gone_since=None, finishing=False)

    def prepares(self, site: str, now: float, still: bool, said_s: float = 0.0) -> Gathering:
        """The site is preparing, or is so no more.

        Args:
            site: The site.
            now: On the caller's clock.
            still: Whether it is preparing.
            said_s: Seconds that it says it has spent so; it knows what this end did not see.
        """
        member = self._member(site)
        since = now if still and member.gone_since is None else None
        prepared = max(said_s, member.prepared(now))
        return self._with(site, prepared_s=prepared, preparing_since=since)

    def told(self, sites: Iterable[str]) -> Gathering:
        """The sites were told to finish."""
        machine = self
        for site in sites:
            machine = machine._with(site, finishing=True)
        return machine

    def known(self, site: str, reason: str) -> Gathering:
        """Something that explains why a site has not answered; it decides nothing."""
        if not reason or self._member(site).status != "open":
            return self
        return self._with(site, reason=reason)

    def _member(self, site: str) -> Member:
        return self.members.get(site, Member())

    def _with(self, site: str, **changes: object) -> Gathering:
        if site not in self.members:
            return self  # a site that isn't in the cohort changes nothing
        member = replace(self.members[site], **changes)  # type: ignore[arg-type]
        return replace(self, members={**self.members, site: member})

    # -- what follows -----------------------------------------------------------------------------

    @property
    def counted_sites(self) -> tuple[str, ...]:
        """Sites that are counted, by name."""
        return tuple(sorted(s for s, m in self.members.items() if m.status == "counted"))

    @property
    def missing(self) -> dict[str, str]:
        """Sites that are not counted, with the reason as far as it is known."""
        return self._missing("did not answer in time")

    def _missing(self, open_word: str) -> dict[str, str]:
        out = {}
        for site, member in sorted(self.members.items()):
            if member.status == "failed":
                out[site] = member.reason
            elif member.status == "open":
                how = "gone" if member.gone_since is not None else open_word
                out[site] = f"{how}: {member.reason}" if member.reason else how
        return out

    def decide(self, now: float) -> Decision:
        """What to do now."""
        counted = len(self.counted_sites)
        still_open = {s: m for s, m in self.members.items() if m.status == "open"}
        if not still_open and counted >= self.quorum:
            return Decision("close", "every site answered")
        if counted + len(still_open) < self.quorum:
            what, others = "can't be reached any more", "had not answered yet"
            return Decision("abandon", self._shortfall(counted, what, others))
        ends = {s: self._ends(m) for s, m in still_open.items()}
        awaited = [m for s, m in still_open.items() if now < ends[s]]
        if not awaited:
            if counted >= self.quorum:
                return Decision("close", "the deadline passed")
            what, others = "was not there at the deadline", "did not answer in time"
            return Decision("abandon", self._shortfall(counted, what, others))
        wakes = [end for end in ends.values() if end > now]
        if counted >= self.quorum and all(m.gone_since is not None for m in awaited):
            ready = max(m.gone_since or 0.0 for m in awaited) + self.grace
            if now >= ready:
                return Decision("close", "the quorum is counted and the others are gone")
            wakes.append(ready)
        finish = []
        for site, member in still_open.items():
            if member.lead_s is None or member.finishing or member.gone_since is not None:
                continue
            if now >= ends[site] - member.lead_s:
                finish.append(site)
            else:
                wakes.append(ends[site] - member.lead_s)
        return Decision("wait", "", min(wakes), tuple(finish))

    def _ends(self, member: Member) -> float:
        """The deadline of one site, if it goes on with what it does now."""
        own = self.deadline + min(self.patience, member.prepared_s)
        since = member.preparing_since
        return own if since is None or since >= own else self.deadline + self.patience

    def _shortfall(self, counted: int, what: str, others: str) -> str:
        missing = "; ".join(f"{site}: {why}" for site, why in self._missing(others).items())
        return f"the quorum of {self.quorum} {what} ({counted} counted; missing {missing})"
