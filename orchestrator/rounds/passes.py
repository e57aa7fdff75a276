"""The passes of a reduction in their order: the same in the daemon and in one worker.

A large model is reduced by many calls that the daemon makes, a small one by a single call in which
a worker makes them itself. No torch here: the daemon imports this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Call = Callable[[str, list[dict[str, Any]]], list[dict[str, Any]]]
"""Runs a function of `arithmetic.FUNCTIONS` over some items; gives the results in their order."""

Spans = Sequence[tuple[int, int]]
"""Half-open runs of tiles that together are all of them."""


def passes(job: dict[str, Any], spans: Spans, call: Call) -> dict[str, Any]:
    """Measure where a strategy asks for it, weigh, reduce and step, and merge the side payloads.

    Args:
        job: See `arithmetic.job.Job`.
        spans: How the tiles are divided.
        call: Who runs a function.

    Returns:
        ``weights`` (site to a list over the groups), ``cosines`` (site to that of its update to
        the sum of the others', if the job asks for it), ``relative_change``, ``chunks`` and
        ``state_chunks`` (number and digest of those that one run wrote alone), ``state_manifest``
        (JSON text; empty for no outer state), ``payloads`` (as of `assessment.pool`).
    """
    runs = [{"first": first, "end": end} for first, end in spans]
    prepared = call("prepare", [{"job": job}])[0]
    gram = None
    if prepared["measure"] or job["cosines"]:
        found = call("measure_run", [{"job": job, **run} for run in runs])
        gram = added_gram(found, len(job["sources"]))
    asked = {**job["cohort"], "stack": job["stack"], "gram": gram if prepared["measure"] else None}
    weights = call("weigh", [asked])[0]["weights"]
    reduced = call("reduce_run", [{"job": job, "weights": weights, **run} for run in runs])
    merged = call("pool", [job["pool"]])[0]["payloads"] if job["pool"]["sites"] else {}
    sites = job["cohort"]["sites"]
    return {
        "weights": dict(zip(sites, weights, strict=True)),
        "cosines": dict(zip(sites, cosines(gram), strict=True)) if gram and job["cosines"] else {},
        "relative_change": relative_change(reduced),
        "chunks": [chunk for run in reduced for chunk in run["chunks"]],
        "state_chunks": [chunk for run in reduced for chunk in run["state_chunks"]],
        "state_manifest": prepared["state_manifest"],
        "payloads": merged,
    }


def added_gram(results: list[dict[str, Any]], n: int) -> list[list[float]]:
    """The Gram matrix of n sites, added in tile order."""
    out = [[0.0] * n for _ in range(n)]
    for tile in _in_order(results):
        for i, line in enumerate(tile["gram"]):
            for j, value in enumerate(line):
                out[i][j] += value
    return out


def cosines(gram: list[list[float]]) -> list[float]:
    """Of each update to the sum of the others, from their Gram matrix; 0 where either is zero."""
    everyone, out = range(len(gram)), []
    for i in everyone:
        others = [j for j in everyone if j != i]
        along = sum(gram[i][j] for j in others)
        size = gram[i][i] * sum(gram[j][k] for j in others for k in others)
        out.append(along / math.sqrt(size) if size > 0 else 0.0)
    return out


def relative_change(results: list[dict[str, Any]]) -> float:
    """||reduced update|| / ||base|| over parameters; infinite for a base of zeros."""
    delta = base = 0.0
    for tile in _in_order(results):
        delta += tile["delta_sq"]
        base += tile["base_sq"]
    return math.sqrt(delta) / math.sqrt(base) if base > 0 else math.inf


def _in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted((t for r in results for t in r["tiles"]), key=lambda t: t["tile"])
