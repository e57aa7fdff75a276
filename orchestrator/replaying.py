"""A committed round computed again from what the sites sent, to the same digests or to a named place.

The very steps of a round run, over a store whose writes are thrown away: neither ledger nor store is
touched, and nothing is asked of a site. Which plug-ins had a part is taken from the record, since what
they would be judged by came from the sites.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orchestrator.board import Board
from orchestrator.ledger import ContributionRow, PlanKind, RoundRow, RunRow
from orchestrator.ledger.database import to_json
from orchestrator.rounds.assess import evaluate
from orchestrator.rounds.commit import finite
from orchestrator.rounds.engine import Candidate, Engine, Model, Planned
from orchestrator.rounds.gather import Closed
from orchestrator.rounds.reduce import reduce
from orchestrator.rounds.refine import refined_by
from orchestrator.run_config import RunConfig
from orchestrator.store import Store
from orchestrator.store.overlay import Overlay
from orchestrator.views import Compared, Replay
from protos.contribution import Header
from protos.digest import digest
from protos.errors import DataCorrupt, InvalidInput, NotFound
from protos.manifest import CHUNK_BYTES, Manifest


def replay(engine: Engine, name: str, number: int) -> Replay:
    """Compute a committed round again and compare everything that follows from it.

    Raises:
        NotFound: There is no such committed round, or retention removed what it was made of.
        DataCorrupt: The store's copy of a contribution or of the base is damaged; says whose and
            which tensor.
        InvalidInput: It is round 0, which is computed from no contribution.
    """
    start = time.monotonic()
    run = engine.ledger.run(name)
    planned = _planned(engine, run, number)
    rows = _closed_in(engine, planned)
    _check_bytes(engine, planned, rows)
    cost = engine.store.index(planned.base.shared).nbytes
    with engine.store.reserve(cost * 3), _aside(engine, planned) as aside:
        closed = Closed(rows, reason=planned.row.reason)
        candidate = reduce(aside, planned, closed)
        candidate, notes = _refined(aside, planned, closed, candidate)
        compared = [*_compared(engine, aside, planned, candidate)]
        compared += _assessed(aside, planned, notes)
    return Replay(
        run=run.name,
        round=number,
        attempt=planned.row.attempt,
        sites=tuple(c.site for c in rows),
        identical=all(one.same for one in compared),
        compared=tuple(compared),
        notes=tuple(notes),
        seconds=time.monotonic() - start,
    )


# -- what it was computed from ----------------------------------------------------------------------


def _planned(engine: Engine, run: RunRow, number: int) -> Planned:
    """The round as it was planned."""
    if number == 0:
        raise InvalidInput("round 0 is the first base: no contribution went into it")
    history = engine.ledger.history(run.id)
    before, row = None, None
    for one in history:
        if one.round == number:
            row = one
        elif one.round < number:
            before = one
    if row is None or before is None:
        have = f"rounds 1 to {history[-1].round}" if len(history) > 1 else "none yet"
        raise NotFound(f"run {run.name}: no committed round {number}; committed are {have}")
    if row.base != before.model:
        raise DataCorrupt(
            f"run {run.name}: round {number} started from {row.base[:12]}, which is not the model of"
            f" round {before.round}; `farflung verify {run.name}` says more",
            run=run.name,
            round=number,
        )
    return Planned(RunConfig.from_resolved(run.config), run, row, Model.of(before), before)


def _closed_in(engine: Engine, planned: Planned) -> tuple[ContributionRow, ...]:
    """The closed set, in the order of sites."""
    row = planned.row
    rows = engine.ledger.contributions(row.run, row.round, row.attempt, "train")
    rows.sort(key=lambda c: c.site)
    if tuple(c.digest for c in rows) != row.closed_set:
        raise DataCorrupt(
            f"run {planned.run.name}: what counts for round {row.round} is not its closed set;"
            f" `farflung verify {planned.run.name}` says more",
            run=planned.run.name,
            round=row.round,
        )
    return tuple(rows)


def _check_bytes(engine: Engine, planned: Planned, rows: tuple[ContributionRow, ...]) -> None:
    """Whether everything that goes in is there, with its digest."""
    store, row, run = engine.store, planned.row, planned.run
    parts = [(name, "its base") for name in planned.base.parts().values()]
    parts += [(planned.before.outer_state, "the outer state before it")]
    for name, what in parts:
        if name:
            try:
                store.verify(name)
            except NotFound as error:
                raise _can_not(run, row, f"{what}: {error.message}") from None
    gone = []
    for c in rows:
        try:
            store.verify(c.index)
        except NotFound:
            gone.append(c.site)
        except DataCorrupt as error:
            where = _tensor_at(store, row, c, int(error.facts.get("chunk", 0)))
            raise DataCorrupt(
                f"run {run.name}, round {row.round}: what site {c.site} sent is damaged in {where}:"
                f" {error.message}",
                run=run.name,
                round=row.round,
                site=c.site,
            ) from None
    if gone:
        kept = engine.config.retention.contributions
        raise _can_not(
            run,
            row,
            f"the contributions of {', '.join(gone)} are not in the store any more ([retention]"
            f" contributions = {kept}; `farflung verify {run.name}` says if they were lost)",
        )


def _can_not(run: RunRow, row: RoundRow, why: str) -> NotFound:
    return NotFound(
        f"run {run.name}: round {row.round} can't be computed again: {why}",
        run=run.name,
        round=row.round,
    )


def _tensor_at(store: Store, row: RoundRow, c: ContributionRow, chunk: int) -> str:
    """What of a contribution lies in a chunk, in words."""
    header = Header.decode(c.header)
    covered = store.manifest(row.draft["manifest"]).covering(row.draft["covered"])
    first, end = chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES
    spans = zip(covered.tiles, header.block_spans(covered), strict=True)
    names = dict.fromkeys(tile.spec.name for tile, (a, b) in spans if a < end and b > first)
    names |= {
        name: None for name, (a, b) in header.tail_spans(c.nbytes).items() if a < end and b > first
    }
    return "tensors " + _few(list(names)) if names else f"chunk {chunk}"


# -- computing it -----------------------------------------------------------------------------------


@contextmanager
def _aside(engine: Engine, planned: Planned) -> Iterator[Engine]:
    """The daemon's parts for a round that nobody watches and that leaves nothing."""
    with engine.scratch(f"replay-{planned.name}") as folder:
        aside = copy.copy(engine)
        aside.store = Overlay(folder / "store", engine.store)
        aside.board = Board()
        aside.note = lambda level, run, round, site, text: None
        aside.publish = lambda: None
        yield aside


def _refined(
    aside: Engine, planned: Planned, closed: Closed, candidate: Candidate
) -> tuple[Candidate, list[str]]:
    """The candidate after the plug-ins that had a part in what was committed."""
    notes = []
    states = {p["name"]: p for p in planned.row.summary.get("plugins", ())}
    hooks = aside.stack_facts(planned.stack)["hooks"]
    for name in (c["name"] for c in planned.stack):
        if "refine" not in hooks[name]:
            continue
        recorded = states.get(name)
        if recorded is None or recorded["state"] != "done":
            why = recorded["reason"] if recorded else "no reason is recorded"
            notes.append(f"{name} had no part in the model, and has none here: {why}")
            continue
        candidate = refined_by(aside, planned, closed, candidate, name)
        if candidate.plugins[-1].state != "done":
            notes.append(f"{name} was done then and failed now: {candidate.plugins[-1].reason}")
    return candidate, notes


def _compared(
    engine: Engine, aside: Engine, planned: Planned, candidate: Candidate
) -> Iterator[Compared]:
    row = planned.row
    recorded, computed = Model.of(row).parts(), candidate.model.parts()
    for place in sorted(recorded.keys() | computed.keys(), key=lambda p: (p != "shared", p)):
        what = "model" if place == "shared" else f"{place} part of the model"
        old, new = recorded.get(place, ""), computed.get(place, "")
        yield Compared(
            what=what, recorded=old, computed=new, tensors=_differing(engine, aside, old, new)
        )
    if row.outer_state or candidate.outer_state:
        old, new = row.outer_state, candidate.outer_state
        tensors = _differing(engine, aside, old, new)
        yield Compared(what="outer state", recorded=old, computed=new, tensors=tensors)
    for what, then, now in (
        ("memos", row.memos, candidate.memos),
        ("side payloads", row.summary.get("payloads", {}), candidate.payloads),
        ("files", row.summary.get("files", {}), candidate.files),
    ):
        if then or now:
            yield Compared(what=what, recorded=_name(then), computed=_name(now))


def _assessed(aside: Engine, planned: Planned, notes: list[str]) -> Iterator[Compared]:
    """Scores and calibration maps, from the sums that the sites sent."""
    row, summary = planned.row, planned.row.summary
    if not summary.get("assessed"):
        return
    kinds: tuple[PlanKind, ...] = ("assess", "baseline")
    kind = next((k for k in kinds if _is_of(aside, row, k)), None)
    if kind is None:
        notes.append(
            "scores and maps were not computed again: the sums of this very model made room for"
            " those of another try of its plug-ins"
        )
        return
    try:
        found = evaluate(aside, planned, kind, True)
        maps: dict[str, Any] = {**found["calibration"], **found["settled"]}
        scores = found["scores"]
        again = aside.ledger.contributions(row.run, row.round, row.attempt, "reassess")
        if again and len(again) >= row.quorum:  # fewer were not used: that exchange was given up
            second = evaluate(aside, planned, "reassess", False)
            scores, maps = {**scores, **second["scores"]}, {**maps, **second["settled"]}
    except NotFound as error:
        notes.append(f"scores and maps were not computed again: {error.message}")
        return
    then = summary.get("scores", {})
    yield Compared(what="scores", recorded=_name(then), computed=_name(finite(scores)))
    if maps or summary.get("calibration"):
        then = summary.get("calibration", {})
        yield Compared(what="calibration maps", recorded=_name(then), computed=_name(maps))


def _is_of(aside: Engine, row: RoundRow, kind: PlanKind) -> bool:
    """Whether an exchange's sums are those of the model that was committed."""
    rows = aside.ledger.contributions(row.run, row.round, row.attempt, kind)
    return bool(rows) and all(Header.decode(c.header).base == row.model for c in rows)


# -- naming what differs ----------------------------------------------------------------------------


def _name(document: Any) -> str:
    return digest(to_json(document).encode())


def _differing(engine: Engine, aside: Engine, old: str, new: str) -> tuple[str, ...]:
    """Tensors in which two artefacts differ; none where one of them is not there."""
    if old == new or not old or not new:
        return ()
    try:
        manifest: Manifest = engine.store.manifest(engine.store.index(old).manifest)
        if aside.store.index(new).manifest != manifest.digest:
            return ("(their manifests differ)",)
        found = []
        for spec, at in zip(manifest, manifest.offsets, strict=True):
            span = (at, at + spec.nbytes)
            if engine.store.read_range(old, *span) != aside.store.read_range(new, *span):
                found.append(spec.name)
    except NotFound:
        return ()
    return tuple(found)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
