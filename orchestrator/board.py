"""What the sites are doing right now: memory only, rebuilt from their messages after a restart."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from orchestrator.speeds import Speed, measured
from orchestrator.views import SitePhase, SiteWork, WorkState

PUBLISH_EVERY_S = 0.25
"""Progress is published at most this often; every change of a state is published at once."""

FINAL: frozenset[WorkState] = frozenset({"counted", "late", "refused", "failed", "left"})


@dataclass
class _Live:
    """One site's row while it changes."""

    site: str
    state: WorkState = "asked"
    error: str = ""
    reason: str = ""
    phases: list[SitePhase] = field(default_factory=list)
    done: float | None = None
    planned: float | None = None
    unit: str = ""
    begun_at: float | None = None  # what was done of the training when it was first heard of
    finishing: bool = False  # it was told to; so being counted does not mean that all is done
    partial: bool = False
    from_round: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    examples: int | None = None
    examples_per_s: float | None = None
    waits_until: float | None = None
    received_bytes: int = 0
    sent_bytes: int = 0
    norm: float | None = None
    weight: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    said: tuple[WorkState, float | None] = ("asked", None)  # how far it is
    moved: float = 0.0  # since when it has not said anything else
    shown: SiteWork | None = None  # as long as nothing changes

    def enter(self, state: WorkState, now: float) -> bool:
        """Enter a state; whether it is a new one."""
        if self.phases and self.state == state:
            return False
        if self.phases:
            now = max(now, self.phases[-1].start)  # the clock may have been set back
            self.phases[-1] = self.phases[-1].model_copy(update={"end": now})
        self.state = state
        self.phases.append(SitePhase(state=state, start=now))
        return True

    def view(self, now: float) -> SiteWork:
        """The row as a view."""
        eta_s = self._eta(now)
        if self.shown is None or eta_s is not None:
            self.shown = self._view(eta_s)
        return self.shown

    def _view(self, eta_s: float | None) -> SiteWork:
        return SiteWork(
            site=self.site,
            state=self.state,
            error=self.error,
            reason=self.reason,
            phases=tuple(self.phases),
            done=self.done,
            planned=self.planned,
            unit=self.unit,
            partial=self.partial,
            from_round=self.from_round,
            loss=self.loss,
            learning_rate=self.learning_rate,
            examples=self.examples,
            examples_per_s=self.examples_per_s,
            eta_s=eta_s,
            waits_until=None if self.state in FINAL else self.waits_until,
            received_bytes=self.received_bytes,
            sent_bytes=self.sent_bytes,
            norm=self.norm,
            weight=self.weight,
            scores=dict(self.scores),
        )

    def speed(self, now: float) -> Speed | None:
        """How fast it was in this round, as far as that was seen."""
        if self.done is None or self.begun_at is None:
            return None
        return measured(self.phases, self.unit, self.done - self.begun_at, now)

    def _eta(self, now: float) -> float | None:
        if self.state != "training" or not self.done or not self.planned:
            return None
        started = self.phases[-1].start
        return max(0.0, (self.planned - self.done) * (now - started) / self.done)


class Board:
    """The live rows of the round under way.

    Args:
        publish: Called, outside the lock, when something visible changed.
    """

    def __init__(self, publish: Callable[[], None] = lambda: None) -> None:
        self._publish = publish
        self._lock = threading.Lock()
        self._key: tuple[str, int, int] = ("", -1, 0)
        self._rows: dict[str, _Live] = {}
        self._published = 0.0
        self.seconds: dict[str, float] = {}

    def begin(self, run: str, round: int, attempt: int, sites: Iterable[str]) -> None:
        """A new attempt starts; rows of the one before are forgotten."""
        now = time.time()
        with self._lock:
            if self._key != (run, round, attempt):
                self._key, self._rows, self.seconds = (run, round, attempt), {}, {}
            for site in sites:
                if site not in self._rows:
                    self._rows[site] = _Live(site)
                    self._rows[site].enter("asked", now)
        self._publish()

    @property
    def key(self) -> tuple[str, int, int]:
        """(run, round, attempt) that the rows belong to."""
        return self._key

    def rows(self) -> tuple[SiteWork, ...]:
        """The rows by site name."""
        now = time.time()
        with self._lock:
            return tuple(self._rows[s].view(now) for s in sorted(self._rows))

    def state(self, site: str) -> WorkState | None:
        """Where a site is; None if it is not in the round."""
        with self._lock:
            row = self._rows.get(site)
            return None if row is None else row.state

    def set_state(self, site: str, state: WorkState, error: str = "", reason: str = "") -> None:
        """A site entered a state."""
        with self._lock:
            row = self._rows.get(site)
            if row is None or (row.state in FINAL and state not in FINAL):
                return
            row.shown = None
            row.error, row.reason = error, reason
            if state == "counted" and row.planned is not None and not row.finishing:
                row.done = row.planned
            row.enter(state, time.time())
        self._publish()

    def progress(
        self,
        site: str,
        state: WorkState,
        done: float | None,
        planned: float | None,
        unit: str,
        loss: float | None,
        learning_rate: float | None,
        examples_per_s: float | None,
        waits_until: float | None = None,
    ) -> None:
        """A site said where it is."""
        now = time.time()
        with self._lock:
            row = self._rows.get(site)
            if row is None or row.state in FINAL:
                return
            row.shown = None
            if row.said != (state, done):
                row.said, row.moved = (state, done), now
            new = row.enter(state, now) or waits_until != row.waits_until
            row.waits_until = waits_until
            if state == "training":
                row.done, row.planned, row.unit = done, planned, unit
                row.begun_at = done if row.begun_at is None else row.begun_at
                row.loss, row.learning_rate = loss, learning_rate
                row.examples_per_s = examples_per_s
            publish = new or now - self._published > PUBLISH_EVERY_S
            if publish:
                self._published = now
        if publish:
            self._publish()

    def note(
        self,
        site: str,
        *,
        received: int = 0,
        sent: int = 0,
        norm: float | None = None,
        weight: float | None = None,
        examples: int | None = None,
        loss: float | None = None,
        scores: dict[str, float] | None = None,
        reason: str | None = None,
        finishing: bool = False,
        partial: tuple[float, float, str] | None = None,
        from_round: int | None = None,
    ) -> None:
        """Facts about a site's part in the round; bytes are added (seen from the site).

        ``partial`` is what was done of its work, of how much, in which unit, if that was cut.
        """
        with self._lock:
            row = self._rows.get(site)
            if row is None:
                return
            row.shown = None
            row.received_bytes += received
            row.sent_bytes += sent
            row.norm = norm if norm is not None else row.norm
            row.weight = weight if weight is not None else row.weight
            row.examples = examples if examples is not None else row.examples
            row.loss = loss if loss is not None else row.loss
            row.reason = reason if reason is not None else row.reason
            row.scores.update(scores or {})
            row.finishing = row.finishing or finishing
            row.from_round = from_round if from_round is not None else row.from_round
            if partial is not None:
                done, row.planned, row.unit = partial
                row.partial, row.done = True, done or None

    def standing(self, site: str) -> str:
        """How far a site is, and since when nothing more was heard of it, in words."""
        with self._lock:
            row = self._rows.get(site)
            if row is None or row.state in FINAL:
                return ""
            done = ""
            if row.state == "training" and row.planned:
                done = f", {row.done or 0:.3g} of {row.planned:.3g} {row.unit}"
            silent = max(0.0, time.time() - (row.moved or row.phases[0].start))
            return f"{row.state}{done}, no progress for {silent:.0f} s"

    def took(self, phase: str, seconds: float) -> None:
        """Add wall seconds of one of the orchestrator's own phases."""
        with self._lock:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def speeds(self) -> dict[str, Speed]:
        """How fast the sites were in this round, up to now."""
        now = time.time()
        with self._lock:
            found = {site: row.speed(now) for site, row in self._rows.items()}
        return {site: speed for site, speed in found.items() if speed is not None}

    def wire_bytes(self) -> int:
        """Bytes of payload over the wire in this round, both ways."""
        with self._lock:
            return sum(r.received_bytes + r.sent_bytes for r in self._rows.values())

    def mean_seconds(self, rows: Sequence[SiteWork]) -> dict[str, float]:
        """Seconds by phase: the phases of ``rows`` as a mean over the sites, and our own."""
        now = time.time()
        totals: dict[str, float] = {}
        for row in rows:
            for phase in row.phases:
                if phase.state not in FINAL:
                    name = "waiting" if phase.state == "asked" else phase.state
                    end = phase.end if phase.end is not None else now
                    totals[name] = totals.get(name, 0.0) + end - phase.start
        out = {name: total / max(1, len(rows)) for name, total in totals.items()}
        with self._lock:
            return {**out, **self.seconds}
