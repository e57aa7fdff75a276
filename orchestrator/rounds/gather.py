"""Step 2: collect the contributions and close the round, or give the attempt up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from orchestrator.exchange import Gathered, Terms
from orchestrator.ledger import ContributionRow, PlanRow
from orchestrator.rounds.engine import Engine, Planned
from orchestrator.small import small_model
from orchestrator.speeds import Speed, lead_s, speeds_of
from protos.contribution import Header
from protos.faults import reach
from protos.plan import round_of


@dataclass(frozen=True)
class Closed:
    """A round that was closed.

    Attributes:
        contributions: The closed set, by site name.
        missing: Sites that were asked and are not in it, with the reason.
        reason: Why it was closed then.
        devices: What the sites trained on.
        speeds: How fast the sites were; none where a restart forgot it.
    """

    contributions: tuple[ContributionRow, ...]
    missing: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    devices: Mapping[str, str] = field(default_factory=dict)
    speeds: Mapping[str, Speed] = field(default_factory=dict)


def gather(engine: Engine, planned: Planned) -> Closed | Gathered:
    """The closed set; or how the exchange ended where it can't be closed."""
    row, ledger = planned.row, engine.ledger
    plans = [p for p in ledger.plans(row.run, row.round, row.attempt) if p.kind == "train"]
    engine.board.begin(row.run, row.round, row.attempt, [p.site for p in plans])
    if row.state != "planned":  # closed before a restart
        return closed_set(engine, planned, plans, row.reason)
    base = small_model(engine.store, row.base)
    gathered = engine.exchange.gather(plans, _terms(planned, plans), base)
    if gathered.interrupted or gathered.decision.kind != "close":
        return gathered
    reason, speeds = gathered.decision.reason, engine.board.speeds()
    reach("round.closing")
    ledger.close_round(row.run, row.round, row.attempt, None, reason)
    reach("round.closed")
    if not goes_on(planned):
        engine.exchange.cancel(plans, list(gathered.missing), "the round was closed")
    closed = closed_set(engine, planned, plans, reason, gathered.missing)
    return replace(closed, speeds=speeds)


def goes_on(planned: Planned) -> bool:
    """Whether sites that are still at work go on: what they have then counts in the next round."""
    return bool(planned.config.cohort.stale) and planned.row.round < planned.run.rounds


def _terms(planned: Planned, plans: list[PlanRow]) -> Terms:
    row, cohort = planned.row, planned.config.cohort
    leads = {}
    if cohort.partial:
        speeds = speeds_of(planned.before.summary)
        leads = {p.site: lead_s(speeds.get(p.site), cohort.deadline_s) for p in plans}
    seconds = row.started + row.deadline_s - time.time()
    return Terms(row.quorum, seconds, cohort.deadline_s, leads)


def closed_set(
    engine: Engine,
    planned: Planned,
    plans: list[PlanRow],
    reason: str,
    missing: dict[str, str] | None = None,
) -> Closed:
    """What the ledger says is in a closed round."""
    row = planned.row
    counted = engine.ledger.contributions(row.run, row.round, row.attempt, "train")
    counted.sort(key=lambda c: c.site)
    inside = {c.site for c in counted}
    devices, before = {}, planned.before.summary.get("devices", {})
    for contribution in counted:
        site, header = contribution.site, Header.decode(contribution.header)
        devices[site] = header.packages.get("device", "")
        engine.board.set_state(contribution.site, "counted")
        engine.board.note(contribution.site, norm=contribution.norm)
        for text in odd(contribution, header, before.get(site, "")):
            engine.note("warning", row.run, row.round, contribution.site, text)
        if (asked := round_of(contribution.plan_id)) != row.round:
            text = (
                f"site {contribution.site}: its work for round {asked} counts in round {row.round}"
            )
            engine.note("info", row.run, row.round, contribution.site, text)
    known = missing or {}
    left_out = {
        p.site: known.get(p.site) or p.message or "did not answer in time"
        for p in plans
        if p.site not in inside
    }
    for site, why in left_out.items():
        text = f"site {site} is not in round {row.round}: {why}"
        engine.note("warning", row.run, row.round, site, text)
    return Closed(tuple(counted), left_out, reason, devices)


def odd(row: ContributionRow, header: Header, trained_on: str) -> list[str]:
    """What an operator should know of a contribution that counts all the same.

    Args:
        row: The contribution.
        header: Its header.
        trained_on: The device of the site's contribution to the round before; empty for none.
    """
    found = []
    device = header.packages.get("device", "")
    if trained_on and device != trained_on:
        found.append(
            f"site {row.site}: it trained round {row.round} on {device}, and {trained_on} before; "
            f'if that is not meant, device = "{trained_on}" under [site] in its site.toml has it '
            "train on nothing else"
        )
    if row.norm == 0:
        found.append(
            f"site {row.site}: its update in round {row.round} is zero: it trained and changed "
            "nothing; look at its data and at the learning rate"
        )
    if header.metrics.get("train_state_missing"):
        found.append(
            f"site {row.site}: its state from before round {row.round} is not there any more, "
            "or damaged (contributions/ of its folder); it began afresh"
        )
    return found
