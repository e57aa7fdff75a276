"""Step 3: from the closed set to a candidate, over Ray: work goes to the bytes."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from orchestrator.ledger import ContributionRow
from orchestrator.rounds.engine import (
    COMPUTE_S,
    Candidate,
    Engine,
    Model,
    Planned,
    payload_specs,
    write_json,
)
from orchestrator.rounds.gather import Closed
from protos.contribution import Header
from protos.manifest import Manifest

RUNS_PER_WORKER = 4
"""Tasks per worker: few enough that their cost does not show, enough to balance."""


def reduce(engine: Engine, planned: Planned, closed: Closed) -> Candidate:
    """Reduce and step all tiles; gives the candidate, in the store."""
    store, draft = engine.store, planned.row.draft
    shared = store.manifest(draft["manifest"])
    with engine.scratch(f"reduce-{planned.name}") as folder:
        rows = closed.contributions
        payloads = {c.site: payload_specs(engine, c) for c in rows}
        job = _job(engine, planned, rows, folder)
        spans = runs(shared, engine.workers * RUNS_PER_WORKER)
        weights = _weights(engine, planned, rows, job, spans, payloads, folder)
        for source in job["sources"]:
            source["weights"] = weights[source["site"]]
        out = store.scratch(f"{planned.name}-model")
        state_out = _state_files(engine, planned, job, folder)
        with out.open("wb") as file:
            os.truncate(file.fileno(), shared.nbytes)
        job["out"] = str(out)
        path = write_json(folder / "reduce.json", job)
        results = engine.compute.map(
            "reduce_run",
            [{"job": path, "first": a, "end": b} for a, b in spans],
            COMPUTE_S,
        )
        model = store.put_file(out, shared.digest).digest
        outer_state = ""
        if state_out is not None:
            manifest = Manifest.decode(Path(job["state_manifest"]).read_bytes())
            store.put_manifest(manifest)
            outer_state = store.put_file(state_out, manifest.digest).digest
        merged = _merged(engine, rows, payloads, folder)
    weight = {site: sum(w) / len(w) for site, w in weights.items()}
    for site, value in weight.items():
        engine.board.note(site, weight=value)
    return Candidate(
        model=Model(model, planned.base.frozen, planned.base.orchestrator),
        outer_state=outer_state,
        relative_change=_relative_change(results),
        weights=weight,
        memos=draft["memos"],
        payloads=merged,
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


def _job(
    engine: Engine, planned: Planned, rows: tuple[ContributionRow, ...], folder: Path
) -> dict[str, Any]:
    draft = planned.row.draft
    return {
        "manifest": str(engine.manifest_file(folder, draft["manifest"])),
        "base": str(engine.store.path(planned.base.shared)),
        "stack": planned.stack,
        "whole_stack": planned.whole_stack,
        "covered": draft["covered"],
        "groups": draft["groups"],
        "round": planned.row.round,
        "seed": planned.config.seed,
        "sources": [
            {
                "site": c.site,
                "payload": str(engine.store.path(c.index)),
                "header": str(engine.header_file(folder, c)),
            }
            for c in rows
        ],
    }


def _weights(
    engine: Engine,
    planned: Planned,
    rows: tuple[ContributionRow, ...],
    job: dict[str, Any],
    spans: list[tuple[int, int]],
    payloads: dict[str, dict[str, Any]],
    folder: Path,
) -> dict[str, list[float]]:
    checked = engine.ask("check_stack", {"stack": planned.stack})
    headers = [Header.decode(c.header) for c in rows]
    for header in headers:
        engine.board.note(
            header.site,
            examples=header.examples,
            loss=header.metrics.get("train_loss"),
        )
    args: dict[str, Any] = {
        "stack": planned.stack,
        "groups": job["groups"],
        "sites": [h.site for h in headers],
        "examples": [float(h.examples) for h in headers],
        "losses": [h.metrics.get("train_loss") for h in headers],
        "staleness": [0 if h.base == planned.base.shared else 1 for h in headers],
        "payloads": _kept_per_site(rows, payloads),
    }
    if {"norms", "gram"} & set(checked["needs"]):
        path = write_json(folder / "measure.json", job)
        items = [{"job": path, "first": a, "end": b} for a, b in spans]
        args["gram"] = _gram(engine.compute.map("measure_run", items, COMPUTE_S), len(rows))
    weights: list[list[float]] = engine.ask("weigh", args)["weights"]
    return {h.site: w for h, w in zip(headers, weights, strict=True)}


def _gram(results: list[dict[str, Any]], n: int) -> list[list[float]]:
    """The Gram matrix, added in tile order."""
    out = [[0.0] * n for _ in range(n)]
    tiles = sorted((t for r in results for t in r["tiles"]), key=lambda t: t["tile"])
    for tile in tiles:
        for i, line in enumerate(tile["gram"]):
            for j, value in enumerate(line):
                out[i][j] += value
    return out


def _kept_per_site(
    rows: tuple[ContributionRow, ...], payloads: dict[str, dict[str, Any]]
) -> dict[str, list[dict[str, Any]]]:
    names = {
        n for specs in payloads.values() for n, s in specs.items() if s["merge"] == "keep per site"
    }
    return {
        name: [payloads[c.site][name] for c in rows]
        for name in sorted(names)
        if all(name in payloads[c.site] for c in rows)
    }


def _state_files(
    engine: Engine, planned: Planned, job: dict[str, Any], folder: Path
) -> Path | None:
    text = engine.ask(
        "state_manifest", {"stack": planned.whole_stack, "manifest": job["manifest"]}
    )["manifest"]
    if not text:
        return None
    manifest = Manifest.decode(text.encode())
    path = folder / "state.manifest"
    path.write_bytes(manifest.encoded)
    job["state_manifest"] = str(path)
    before = planned.before.outer_state
    if before and engine.store.index(before).manifest == manifest.digest:
        job["state_in"] = str(engine.store.path(before))
    out = engine.store.scratch(f"{planned.name}-state")
    with out.open("wb") as file:
        os.truncate(file.fileno(), manifest.nbytes)
    job["state_out"] = str(out)
    return out


def _relative_change(results: list[dict[str, Any]]) -> float:
    tiles = sorted((t for r in results for t in r["tiles"]), key=lambda t: t["tile"])
    delta = base = 0.0
    for tile in tiles:
        delta += tile["delta_sq"]
        base += tile["base_sq"]
    return math.sqrt(delta) / math.sqrt(base) if base > 0 else math.inf


def _merged(
    engine: Engine,
    rows: tuple[ContributionRow, ...],
    payloads: dict[str, dict[str, Any]],
    folder: Path,
) -> dict[str, Any]:
    if not any(payloads.values()):
        return {}
    sites = [
        {
            "site": c.site,
            "examples": Header.decode(c.header).examples,
            "payloads": payloads[c.site],
        }
        for c in rows
    ]
    path = folder / "pooled"
    pooled = engine.ask("pool", {"sites": sites, "out": str(path)})["payloads"]
    if not pooled:
        return {}
    name = engine.store.put_bytes(path.read_bytes())
    return {n: {**spec, "path": "", "object": name} for n, spec in pooled.items()}
