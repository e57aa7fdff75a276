"""From ledger rows and the live board to views: what an operator sees."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

from orchestrator.board import Board
from orchestrator.ledger import Ledger, RoundRow, RunRow, SiteRow
from orchestrator.run_config import RunConfig
from orchestrator.sessions import Session, Sessions
from orchestrator.troubles import Troubles
from orchestrator.views import Plugin, Reliability, Round, Run, Site, SiteWork

ACCURACY = ("test.accuracy", "val.accuracy")


class Viewing:
    """Builds views.

    Args:
        ledger: What happened.
        board: What is happening.
        sessions: Who is here.
        troubles: Why somebody is not.
    """

    def __init__(
        self, ledger: Ledger, board: Board, sessions: Sessions, troubles: Troubles
    ) -> None:
        self._ledger, self._board = ledger, board
        self._sessions, self._troubles = sessions, troubles
        self._reading = threading.Lock()
        self._past: dict[str, list[RoundRow]] = {}

    # -- sites ------------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        """All sites."""
        return [self._site(row) for row in self._ledger.sites()]

    def site(self, name: str) -> Site:
        """One site."""
        return self._site(self._ledger.site(name))

    def _site(self, row: SiteRow) -> Site:
        session = self._sessions.get(row.name)
        hello = session.hello if session is not None else None
        return Site(
            name=row.name,
            state=self._site_state(row, session),
            since=session.since if session else self._sessions.last_seen.get(row.name),
            certificate_expires=row.certificate_expires,
            version=hello.version if hello else "",
            device=hello.device if hello else "",
            tasks={t.name: t.digest for t in hello.tasks} if hello else {},
            packages=dict(hello.packages) if hello else {},
            invited=row.state == "invited",
            trouble=self._troubles.of(row.name, attached=session is not None),
        )

    def _site_state(self, row: SiteRow, session: Session | None) -> str:
        if row.state == "revoked":
            return "revoked"
        if session is not None:
            return "paused" if session.paused else "attached"
        return "gone" if row.name in self._sessions.last_seen else "never attached"

    # -- rounds -----------------------------------------------------------------------------------

    def rounds(self, run: str) -> list[Round]:
        """The rounds of a run from 1 on, each with its last attempt."""
        row = self._ledger.run(run)
        return [self.round_of(r) for r in self._ledger.rounds(row.id) if r.round > 0]

    def attempt(self, run: str, number: int, attempt: int) -> Round | None:
        """One attempt of a round; None for the first model's, which is no round."""
        if number < 1:
            return None
        return self.round_of(self._ledger.round(run, number, attempt))

    def round_of(self, row: RoundRow) -> Round:
        """One attempt of a round."""
        summary, draft = row.summary, row.draft
        live = self._board.key == (row.run, row.round, row.attempt)
        done = row.state == "committed" and bool(summary)
        sites = (
            tuple(SiteWork.model_validate(s) for s in summary.get("sites", ()))
            if done or not live
            else self._board.rows()
        )
        rate = summary.get("learning_rate") or _rates(draft)
        missing = summary.get("missing", {})
        return Round(
            run=row.run,
            round=row.round,
            attempt=row.attempt,
            state=row.state,
            assessed=summary.get("assessed", False),
            started=row.started,
            closed=row.closed,
            committed=row.ended if row.state == "committed" else None,
            deadline=row.started + row.deadline_s if row.state == "planned" else None,
            quorum=row.quorum,
            base=row.base,
            model=row.model,
            work={k: v for k, v in draft.get("work", {}).items() if v is not None},
            learning_rate=tuple(rate) if rate else None,
            relative_change=summary.get("relative_change"),
            scores=summary.get("scores", {}),
            seconds=summary.get("seconds", {})
            if done
            else self._board.mean_seconds(sites)
            if live
            else {},
            wire_bytes=summary.get("wire_bytes", 0)
            if done
            else self._board.wire_bytes()
            if live
            else 0,
            sites=sites,
            plugins=tuple(Plugin.model_validate(p) for p in summary.get("plugins", ())),
            calibration=summary.get("calibration", {}),
            reliability={
                k: Reliability.model_validate(v) for k, v in summary.get("reliability", {}).items()
            },
            missing=missing,
            unassessed={
                site: why
                for site, why in summary.get("unassessed", {}).items()
                if site not in missing
            },
            reason=row.reason,
            held=summary.get("held", ""),
        )

    # -- runs ---------------------------------------------------------------------------------------

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return [self.run_of(r) for r in self._ledger.runs()]

    def run(self, name: str) -> Run:
        """One run, by name or id."""
        return self.run_of(self._ledger.run(name))

    def run_of(self, row: RunRow) -> Run:
        """A run's row as a view."""
        config = RunConfig.from_resolved(row.config)
        history = self._history(row.id)
        last = history[-1] if history else None
        best = best_round(history)
        live = self._board.key[0] == row.id and self._board.key[1] > 0 and row.state == "running"
        current = self._board.key[1] if live else None
        wire = sum(r.summary.get("wire_bytes", 0) for r in history)
        scores = last.summary.get("scores", {}) if last else {}
        epsilon = next(
            (c.params.get("epsilon") for c in config.stack if c.name == "co_learning"), None
        )
        eta = _eta(row, history)
        return Run(
            id=row.id,
            name=row.name,
            state=row.state,
            reason=row.reason,
            headline=self._headline(row, config, history, scores, wire, eta, current),
            diagnosis=self._diagnosis(row, history),
            needs_action=row.state in ("paused", "failed"),
            rounds=row.rounds,
            committed=len(history),
            current=current,
            best=best.round if best else None,
            created=row.created,
            started=row.started,
            ended=row.ended,
            eta_s=eta,
            strategies=tuple(c.name for c in config.stack),
            sites=self._asked(config),
            epsilon=epsilon,
            scores=scores,
            references=config.references,
            wire_bytes=wire,
            config_digest=row.config_digest,
            config=row.config,
            model=row.model,
        )

    def _history(self, run: str) -> list[RoundRow]:
        """The committed rounds from 1 on, without what only the rounds' own views show.

        What is committed stays, but for a rollback (`forget`), so each is read once: this is asked
        after every round.
        """
        with self._reading:
            past = self._past.setdefault(run, [])
            newest = past[-1].round if past else 0
            past += [_outline(row) for row in self._ledger.history(run, after=newest)]
            return list(past)

    def forget(self, run: str) -> None:
        """A run's history is not what it was: it was rolled back."""
        with self._reading:
            self._past.pop(run, None)

    def _asked(self, config: RunConfig) -> tuple[str, ...]:
        if config.cohort.sites != "all":
            return tuple(sorted(config.cohort.sites))
        return tuple(s.name for s in self._ledger.sites() if s.state == "enrolled")

    def _headline(
        self,
        row: RunRow,
        config: RunConfig,
        history: list[RoundRow],
        scores: dict[str, float],
        wire: int,
        eta: float | None,
        current: int | None,
    ) -> str:
        parts = []
        if row.state == "running":
            parts.append(f"Round {current or len(history) + 1} of {row.rounds}")
            parts.append(row.reason or ("learning" if history else "starting"))
        elif row.state == "finished":
            parts.append(f"Finished after {len(history)} rounds")
        else:
            parts.append(f"{row.state.capitalize()} after {len(history)} of {row.rounds} rounds")
        key = next((k for k in ACCURACY if k in scores), None)
        if key is not None:
            reference = config.references.get("centralised")
            beside = f" (centralised {100 * reference:.1f} %)" if reference is not None else ""
            parts.append(f"{key.split('.')[0]} {100 * scores[key]:.1f} %{beside}")
        ece = scores.get("test_calibrated.ece", scores.get("test.ece"))
        if ece is not None:
            parts.append(f"ECE {100 * ece:.1f} %")
        if history:
            asked = len(self._asked(config))
            counted = len(history[-1].summary.get("counted", ()))
            parts.append(f"{counted} of {asked} sites")
        if row.state == "running" and eta and not row.reason:
            parts.append(f"{_duration(eta)} left")
        if wire:
            parts.append(f"{_size(wire)} exchanged")
        return " · ".join(parts)

    def _diagnosis(self, row: RunRow, history: list[RoundRow]) -> str:
        if row.state in ("paused", "failed"):
            return row.reason
        if not history:
            return ""
        last = history[-1]
        missing = last.summary.get("missing", {})
        if missing:
            who = "; ".join(f"{site}: {why}" for site, why in sorted(missing.items()))
            return f"Round {last.round} went without {who}"
        skipped = [p for p in last.summary.get("plugins", ()) if p["state"] == "skipped"]
        if skipped:
            return f"{skipped[0]['name']} was skipped in round {last.round}: {skipped[0]['reason']}"
        if not last.summary.get("assessed", False) and last.summary.get("unassessed"):
            return f"Round {last.round} is unassessed: too few sites evaluated it"
        return ""


def _outline(row: RoundRow) -> RoundRow:
    kept = (
        *("assessed", "counted", "finished", "missing", "plugins", "scores", "unassessed"),
        "wire_bytes",
    )
    summary = {name: row.summary[name] for name in kept if name in row.summary}
    return replace(row, draft={}, memos={}, summary=summary)


def best_round(history: list[RoundRow]) -> RoundRow | None:
    """The committed round with the best validation score; the newest where there is none."""

    def key(row: RoundRow) -> tuple[float, float, int]:
        scores: dict[str, Any] = row.summary.get("scores", {})
        return (scores.get("val.accuracy", -1.0), -scores.get("val.nll", float("inf")), row.round)

    return max(history, key=key) if history else None


def _rates(draft: dict[str, Any]) -> tuple[float, float] | None:
    schedule = draft.get("schedule")
    return (schedule["lr"], schedule["lr"] * schedule["decay"]) if schedule else None


def _eta(row: RunRow, history: list[RoundRow]) -> float | None:
    """Seconds left, from the last rounds' pace, scaled by their work."""
    if row.state != "running" or not history:
        return None
    recent = history[-3:]
    spent = [float(r.summary.get("finished", r.started)) - r.started for r in recent]
    pace = sum(spent) / len(spent)
    since = time.time() - float(recent[-1].summary.get("finished", time.time()))
    return max(0.0, (row.rounds - len(history)) * pace - since)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"
