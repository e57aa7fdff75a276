"""Views as tables for a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.table import Table
from rich.text import Text

from orchestrator import views

NOTHING = "–"

STATE_STYLES = {
    "attached": "green", "gone": "red", "revoked": "red", "paused": "yellow", "failed": "bold red",
    "running": "cyan", "finished": "green", "refused": "bold red", "late": "yellow",
    "counted": "green", "committed": "green", "abandoned": "red", "held": "yellow",
    "superseded": "yellow", "training": "cyan", "sending": "cyan", "fetching": "cyan",
}  # fmt: skip


def state(word: str) -> Text:
    """A state, coloured; it is a word in any case."""
    return Text(word, style=STATE_STYLES.get(word, ""))


def moment(seconds: float | None) -> str:
    """A time in this machine's zone."""
    if seconds is None:
        return NOTHING
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def percent(value: float | None) -> str:
    """A share of one as percent."""
    return NOTHING if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    """A number with some digits behind the point."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes and hours where there are many."""
    if seconds is None:
        return NOTHING
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def score(scores: Mapping[str, float], name: str, calibrated: bool = False) -> float | None:
    """A score on test data, or on validation data where no site has test data."""
    tail = "_calibrated" if calibrated else ""
    return scores.get(f"test{tail}.{name}", scores.get(f"val{tail}.{name}"))


def seconds_of(entry: views.Round) -> float | None:
    """Wall seconds of a round so far, or in all."""
    if entry.committed is not None:
        return entry.committed - entry.started
    if entry.state not in ("planned", "closed"):
        return None
    return max(0.0, time.time() - entry.started)  # the clock may have been set back


def work_of(entry: views.Round) -> str:
    """Local work, such as "5 epochs"."""
    return ", ".join(f"{amount:g} {unit}" for unit, amount in entry.work.items()) or NOTHING


def counted(entry: views.Round) -> str:
    """Sites that were counted, of those asked."""
    done = sum(site.state == "counted" for site in entry.sites)
    return f"{done}/{len(entry.sites)}"


def _table(title: str = "") -> Table:
    return Table(
        title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )


def site_table(sites: Sequence[views.Site]) -> Table:
    """Sites."""
    table = _table()
    for name in ("site", "state", "since", "certificate until", "device", "version", "tasks"):
        table.add_column(name)
    table.add_column("says", overflow="fold")
    for site in sites:
        table.add_row(
            site.name,
            state(site.state),
            moment(site.since),
            moment(site.certificate_expires),
            site.device or NOTHING,
            site.version or NOTHING,
            " ".join(f"{task}@{digest[:8]}" for task, digest in site.tasks.items()) or NOTHING,
            site.trouble,
        )
    return table


def run_table(runs: Sequence[views.Run]) -> Table:
    """Runs."""
    table = _table()
    for name in ("run", "state"):
        table.add_column(name)
    for name in ("rounds", "best", "accuracy", "NLL", "ECE", "sent"):
        table.add_column(name, justify="right")
    for name in ("started", "strategies", "says"):
        table.add_column(name, overflow="fold")
    for run in runs:
        table.add_row(
            run.name,
            state(run.state),
            f"{run.committed}/{run.rounds}",
            str(run.best) if run.best is not None else NOTHING,
            percent(score(run.scores, "accuracy")),
            number(score(run.scores, "nll")),
            percent(score(run.scores, "ece")),
            size(run.wire_bytes),
            moment(run.started),
            " ".join(run.strategies) or NOTHING,
            run.reason or run.diagnosis,
        )
    return table


def round_table(rounds: Sequence[views.Round]) -> Table:
    """Rounds with their scores."""
    table = _table()
    table.add_column("round", justify="right")
    table.add_column("state")
    table.add_column("work")
    for name in (
        "sites", "accuracy", "NLL", "ECE", "ECE calibrated", "δ", "sent", "time",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    table.add_column("notes", overflow="fold")
    for entry in rounds:
        table.add_row(
            str(entry.round),
            state(entry.state),
            work_of(entry),
            counted(entry),
            percent(score(entry.scores, "accuracy")),
            number(score(entry.scores, "nll")),
            percent(score(entry.scores, "ece")),
            percent(score(entry.scores, "ece", calibrated=True)),
            number(entry.relative_change, 4),
            size(entry.wire_bytes),
            duration(seconds_of(entry)),
            notes(entry),
        )
    return table


def notes(entry: views.Round) -> str:
    """What is unusual about a round, and what its plug-ins took, in a few words."""
    found = []
    if entry.attempt > 1:
        found.append(f"attempt {entry.attempt}")
    if entry.missing:
        found.append("without " + ", ".join(entry.missing))
    if entry.unassessed:
        found.append("not evaluated by " + ", ".join(entry.unassessed))
    if entry.state == "committed" and not entry.assessed:
        found.append("unassessed")
    found += [f"{s.site} partial: {progress(s)}" for s in entry.sites if s.partial]
    found += [f"{s.site} from round {s.from_round}" for s in entry.sites if s.from_round]
    found += [f"{p.name} {p.state}: {p.reason}" for p in entry.plugins if p.state != "done"]
    found += [f"{p.name} {cost(p)}" for p in entry.plugins if p.cpu_seconds is not None]
    if entry.held and entry.state == "committed":
        found.append(f"released after it was held: {entry.held}")
    if entry.reason and (entry.missing or entry.state in ("held", "abandoned", "superseded")):
        found.append(entry.reason)
    return "; ".join(found)


def cost(plugin: views.Plugin) -> str:
    """What a plug-in took, such as "3.1 s, CPU 5.2 s"."""
    return f"{duration(plugin.seconds)}, CPU {duration(plugin.cpu_seconds)}"


def work_table(entry: views.Round) -> Table:
    """What each site does in the round under way."""
    table = _table()
    for name in ("site", "state"):
        table.add_column(name, min_width=9)
    for name in ("done", "loss", "learning rate", "examples/s", "received", "sent"):
        table.add_column(name, justify="right")
    table.add_column("", overflow="fold")
    for site in entry.sites:
        table.add_row(
            site.site,
            state(site.state),
            progress(site),
            number(site.loss),
            NOTHING if site.learning_rate is None else f"{site.learning_rate:.3g}",
            NOTHING if site.examples_per_s is None else f"{site.examples_per_s:,.0f}",
            size(site.received_bytes),
            size(site.sent_bytes),
            site.reason or window(site) or remark(site),
        )
    return table


def window(site: views.SiteWork) -> str:
    """What a site waits for whose windows are closed."""
    if site.waits_until is None:
        return ""
    when = datetime.fromtimestamp(site.waits_until).astimezone()
    return f"no window is open until {when:%a %H:%M}"


def remark(site: views.SiteWork) -> str:
    """What else is to be known of a site's work."""
    if site.partial:
        return "partial: cut before the deadline"
    if site.from_round:
        return f"its work for round {site.from_round}"
    return "does not run against the deadline" if site.state == "preparing" else ""


def progress(site: views.SiteWork) -> str:
    """How far a site is, such as "2.5/5 epochs"."""
    if site.done is None or not site.planned:
        return NOTHING
    if site.unit == "bytes":
        return f"{size(site.done)} of {size(site.planned)}"
    return f"{site.done:.3g}/{site.planned:.3g} {site.unit}"
