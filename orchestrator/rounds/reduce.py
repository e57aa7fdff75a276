"""Step 3: from the closed set to a candidate, over Ray: work goes to the bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestrator.ledger import ContributionRow
from orchestrator.rounds.engine import Candidate, Engine, Model, Planned, payload_specs
from orchestrator.rounds.gather import Closed
from orchestrator.rounds.passes import passes
from protos.contribution import Header
from protos.digest import digest
from protos.faults import reach
from protos.manifest import CHUNK_BYTES, Index, Manifest
from protos.plan import round_of

RUNS_PER_WORKER = 4
"""Runs of tiles for each worker: few enough that their cost does not show, enough to balance."""

RUN_BYTES = 32 << 20
"""What a run reads at least: it takes some times as long as the call. A model that needs no more than
this is reduced by one call for all passes together."""


def reduce(engine: Engine, planned: Planned, closed: Closed) -> Candidate:
    """Reduce and step all tiles; gives the candidate, in the store."""
    store = engine.store
    shared = store.manifest(planned.row.draft["manifest"])
    rows = closed.contributions
    with engine.scratch(f"reduce-{planned.name}") as folder:
        job = job_of(engine, planned, rows, folder)
        reach("reduce.begun")
        reads = shared.nbytes * (len(rows) + 1)
        if reads <= RUN_BYTES:
            spans = runs(shared, 1)
            done = engine.ask("reduce_at_once", {"job": job, "spans": spans})
        else:
            spans = runs(shared, min(engine.workers * RUNS_PER_WORKER, reads // RUN_BYTES))
            done = passes(job, spans, engine.run)
        reach("reduce.done")
        model = _adopt(engine, Path(job["out"]), shared, done["chunks"])
        reach("reduce.adopted")
        outer_state = ""
        if done["state_manifest"]:
            manifest = Manifest.decode(done["state_manifest"].encode())
            store.put_manifest(manifest)
            outer_state = _adopt(engine, Path(job["state"]["out"]), manifest, done["state_chunks"])
            reach("reduce.state.adopted")
        merged = _merged(engine, done["payloads"], Path(job["pool"]["out"]))
        reach("reduce.merged")
    weight = {site: sum(w) / len(w) for site, w in done["weights"].items()}
    for site, value in weight.items():
        engine.board.note(site, weight=value)
    return Candidate(
        model=Model(model, planned.base.frozen, planned.base.orchestrator),
        outer_state=outer_state,
        relative_change=done["relative_change"],
        weights=weight,
        memos=planned.row.draft["memos"],
        payloads=merged,
        files=planned.before.summary.get("files", {}),
        cosines=done["cosines"],
    )


def runs(manifest: Manifest, count: int) -> list[tuple[int, int]]:
    """All tiles as at most ``count`` half-open runs of about equal numbers of elements."""
    tiles = manifest.tiles
    total = sum(t.elements for t in tiles)
    out: list[tuple[int, int]] = []
    first = taken = 0
    for i, tile in enumerate(tiles):
        taken += tile.elements
        if taken * count >= total * (len(out) + 1):
            out.append((first, i + 1))
            first = i + 1
    if first < len(tiles):
        out.append((first, len(tiles)))
    return out


def job_of(
    engine: Engine, planned: Planned, rows: tuple[ContributionRow, ...], folder: Path
) -> dict[str, Any]:
    """The document of `arithmetic.job.Job`; its outputs are names that no other attempt has."""
    store, draft, before = engine.store, planned.row.draft, planned.before.outer_state
    headers = [Header.decode(c.header) for c in rows]
    ages = {base: age for age, base in reversed([*enumerate(draft.get("accepts", ()))])}
    for header in headers:
        engine.board.note(
            header.site,
            examples=header.examples,
            loss=header.metrics.get("train_loss"),
            partial=_cut(header, draft["work"]) if header.partial else None,
            from_round=asked if (asked := round_of(header.plan_id)) != planned.row.round else None,
        )
    payloads = [payload_specs(engine, c, folder) for c in rows]
    return {
        "manifest": str(engine.manifest_file(folder, draft["manifest"])),
        "base": store.place(planned.base.shared, folder),
        "stack": planned.stack,
        "whole_stack": planned.whole_stack,
        "covered": draft["covered"],
        "groups": draft["groups"],
        "round": planned.row.round,
        "seed": planned.config.seed,
        "cosines": planned.config.gate.cosine is not None,
        "sources": [
            {
                "site": c.site,
                "payload": store.place(c.index, folder),
                "header": str(engine.header_file(folder, c)),
            }
            for c in rows
        ],
        "out": str(store.scratch(f"{planned.name}-model")),
        "cold": str(_cold(engine, planned) or ""),
        "state": {
            "manifest": str(folder / "state.manifest"),
            "out": str(store.scratch(f"{planned.name}-state")),
            "before": store.place(before, folder) if before else "",
            "before_manifest": store.index(before).manifest if before else "",
        },
        "cohort": {
            "groups": draft["groups"],
            "sites": [h.site for h in headers],
            "examples": [float(h.examples) for h in headers],
            "losses": [h.metrics.get("train_loss") for h in headers],
            "staleness": [ages.get(h.base, 0) for h in headers],
            "payloads": _kept_per_site(payloads),
        },
        "pool": {
            "sites": [
                {"site": h.site, "examples": h.examples, "payloads": p}
                for h, p in zip(headers, payloads, strict=True)
                if any(payloads)
            ],
            "out": str(folder / "pooled"),
        },
    }


def _cold(engine: Engine, planned: Planned) -> Path | None:
    """The file of the base before this one: the sites have moved on."""
    digest = planned.before.base
    return engine.store.here(digest) if digest not in ("", planned.base.shared) else None


def _cut(header: Header, work: dict[str, float | None]) -> tuple[float, float, str]:
    """What is done of work that was cut, of how much, in which unit."""
    unit, amount = next((u, a) for u, a in work.items() if a is not None)
    return header.done(unit), amount, unit


def _kept_per_site(payloads: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Unmerged side payloads that every site sent."""
    names = {n for own in payloads for n, s in own.items() if s["merge"] == "keep per site"}
    return {
        name: [own[name] for own in payloads]
        for name in sorted(names)
        if all(name in own for own in payloads)
    }


def _adopt(engine: Engine, path: Path, manifest: Manifest, known: Iterable[tuple[int, str]]) -> str:
    """Store an artefact that runs of tiles wrote; gives its digest.

    Its chunks were hashed while they were written, but for those that two runs share.
    """
    chunks = dict(known)
    with path.open("rb", buffering=0) as file:
        for number, start in enumerate(range(0, manifest.nbytes, CHUNK_BYTES)):
            if number not in chunks:
                chunks[number] = digest(os.pread(file.fileno(), CHUNK_BYTES, start))
    names = tuple(chunks[number] for number in range(len(chunks)))
    return engine.store.adopt(Index(manifest.digest, manifest.nbytes, names), path)


def _merged(engine: Engine, pooled: dict[str, Any], path: Path) -> dict[str, Any]:
    if not pooled:
        return {}
    name = engine.store.put_bytes(path.read_bytes())
    return {n: {**spec, "path": "", "object": name} for n, spec in pooled.items()}
