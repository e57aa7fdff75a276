"""The reduction: from the sites' spooled updates to the next model, tile by tile.

Each call handles a run of consecutive tiles. It reads their ranges of the base and of every
contribution from where they lie, decodes, weighs, reduces and steps in site-id order, and writes the
same ranges of the next model: memory is O(sites x tile) for rules that see every update, O(tile) for
the mean, whatever the model's size.

The bits don't depend on how tiles are grouped into runs, or on how many workers there are: tile
borders come from the manifest alone, every worker uses one torch thread, the mean is accumulated in
site order in fp64 and rounded once, sums per tile are fp64 and combined in tile order by the caller.
Sums of squares are dot products of whole tiles in memory that is aligned always alike, which BLAS
needs in order to give the same bits.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.arithmetic import assessment
from orchestrator.arithmetic.job import Job, Outputs, Room, open_source, place_in
from orchestrator.arithmetic.output import release_pages
from orchestrator.arithmetic.planning import payload_loader, stack_of
from orchestrator.rounds.passes import passes
from protos.manifest import Manifest, TensorSpec, Tile
from protos.tensors import DTYPES, dtype_name
from strategies.context import Cohort
from strategies.stack import Stack, weighted_mean

GRAM_BLOCK = 1 << 14
"""Columns of the updates that are widened to fp64 at a time."""


def prepare(args: dict[str, Any]) -> dict[str, Any]:
    """Make the files that the runs write into, at their full size.

    Args:
        args: ``job``, see `Job`.

    Returns:
        ``measure``: whether pass 1 is needed; ``state_manifest``: JSON text of the outer state's
        manifest, which is also written where the job says, empty if the stack keeps none.
    """
    job = args["job"]
    manifest = Manifest.decode(Path(job["manifest"]).read_bytes())
    _make(job["out"], manifest.nbytes)
    state = state_manifest(stack_of(job["whole_stack"]), manifest)
    if state is not None:
        Path(job["state"]["manifest"]).write_bytes(state.encoded)
        _make(job["state"]["out"], state.nbytes)
    return {
        "measure": bool({"norms", "gram"} & stack_of(job["stack"]).needs),
        "state_manifest": state.encoded.decode() if state is not None else "",
    }


def _make(path: str, nbytes: int) -> None:
    with open(path, "wb") as file:  # noqa: PTH123
        os.truncate(file.fileno(), nbytes)


def state_manifest(stack: Stack, manifest: Manifest) -> Manifest | None:
    """The manifest of a stack's outer state: per key one flat tensor for each parameter."""
    seen: dict[str, dict[str, str]] = {}
    for tile in manifest.tiles:
        if tile.spec.kind == "parameter" and tile.start == 0:
            seen[tile.spec.name] = {k: dtype_name(v) for k, v in stack.init_state(tile).items()}
    specs = [
        TensorSpec(f"{key}/{name}", (manifest[name].elements,), state[key], "statistic")
        for key in dict.fromkeys(k for state in seen.values() for k in state)
        for name, state in seen.items()
    ]
    return Manifest(tuple(specs)) if specs else None


def measure_run(args: dict[str, Any]) -> dict[str, Any]:
    """Pass 1: per tile the Gram matrix of the parameters' updates, (n, n) fp64.

    Args:
        args: ``job``, ``first``, ``end`` (tile numbers).
    """
    job = Job.open(args["job"])
    try:
        return {
            "tiles": [
                {"tile": tile.index, "gram": _gram(job, tile)}
                for tile in job.manifest.tiles[args["first"] : args["end"]]
                if tile.spec.kind == "parameter" and job.covers(tile)
            ]
        }
    finally:
        job.close()


def _gram(job: Job, tile: Tile) -> list[list[float]]:
    rows = _rows(job, tile)
    out = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for start in range(0, tile.elements, GRAM_BLOCK):
        wide = rows[:, start : start + GRAM_BLOCK].double()
        out.addmm_(wide, wide.T)
    # BLAS does not promise that both halves have the same bits.
    exact: list[list[float]] = ((out + out.T) / 2).tolist()
    return exact


def _rows(job: Job, tile: Tile) -> Tensor:
    """A tile of every site, (n, elements)."""
    rows = job.room.rows(len(job.sources), DTYPES[tile.spec.wire_dtype], tile.elements)
    for source, row in zip(job.sources, rows, strict=True):
        source.read(tile, job.stack, row)
    return rows


def weigh(args: dict[str, Any]) -> dict[str, Any]:
    """Weights of the closed set, per group, after the strategies' ``weigh`` hooks.

    Args:
        args: ``stack``, ``sites``, ``examples``, ``losses``, ``staleness``, ``groups``, and, where
            pass 1 ran, ``gram``; ``payloads`` of merge rule "keep per site": name to a list.

    Returns:
        ``weights``: per site a list over the groups (see `Stack.weigh`).
    """
    stack = stack_of(args["stack"])
    groups: list[str] = args["groups"]
    examples = torch.tensor(args["examples"], dtype=torch.float64)
    losses = torch.tensor(
        [math.nan if x is None else x for x in args["losses"]], dtype=torch.float64
    )
    gram = torch.tensor(args["gram"], dtype=torch.float64) if args.get("gram") else None
    with payload_loader() as load:
        sent = {
            name: torch.stack([load(spec) for spec in specs])
            for name, specs in args.get("payloads", {}).items()
        }
    cohort = Cohort(
        sites=tuple(args["sites"]),
        examples=examples,
        losses=losses,
        staleness=torch.tensor(args["staleness"], dtype=torch.int64),
        payloads=sent,
        groups=tuple(groups),
        norms=gram.diagonal().clamp(min=0).sqrt() if gram is not None else None,
        gram=gram,
    )
    return {"weights": stack.weigh(cohort).tolist()}


def reduce_run(args: dict[str, Any]) -> dict[str, Any]:
    """Pass 2: reduce and step a run of tiles and write them.

    Args:
        args: ``job``, ``weights`` (per source a list over the groups), ``first``, ``end`` (tile
            numbers).

    Returns:
        ``tiles``: per parameter tile its number and the fp64 sums of squares of the reduced update
        (before outer step) and of the base; ``chunks`` and ``state_chunks``: number and digest of
        the chunks that lie wholly in this run.
    """
    job = Job.open(args["job"])
    try:
        tiles = job.manifest.tiles[args["first"] : args["end"]]
        if tiles and (cold := args["job"]["cold"]):
            start, _ = place_in(job.manifest, tiles[0].tensor, tiles[0])
            _, stop = place_in(job.manifest, tiles[-1].tensor, tiles[-1])
            release_pages(cold, start, stop)
        outputs = Outputs(job, args["job"])
        weights = torch.tensor(args["weights"], dtype=torch.float64)
        done = False
        try:
            sums = []
            for tile in tiles:
                sums += _reduce_tile(job, tile, weights, outputs)
            done = True
        finally:
            chunks = outputs.close(sync=done)
        return {"tiles": sums, **chunks}
    finally:
        job.close()


def _reduce_tile(job: Job, tile: Tile, weights: Tensor, outputs: Outputs) -> list[dict[str, Any]]:
    base, kind = job.base_tile(tile), tile.spec.kind
    if not job.covers(tile):
        outputs.model(tile, base)
        if kind == "parameter" and job.state_manifest is not None:
            outputs.state(tile, job.state_tile(tile))
        return []
    if kind == "counter":
        outputs.model(tile, _rows(job, tile).amax(0))
        return []
    column = weights[:, job.groups.index(tile.spec.group)]
    if kind == "statistic":
        total = column.sum()
        new = base
        if total > 0:
            new = job.room.tile("new", base.dtype, tile.elements)
            new.copy_(_mean(job, tile, column / total))
        outputs.model(tile, new)
        return []
    return [_step_tile(job, tile, base, column, outputs)]


def _step_tile(
    job: Job, tile: Tile, base: Tensor, weights: Tensor, outputs: Outputs
) -> dict[str, Any]:
    n, wire = tile.elements, DTYPES[tile.spec.wire_dtype]
    delta = job.room.tile("delta", wire, n)
    if job.stack.owner("reduce") is None:
        delta.copy_(_mean(job, tile, weights))
    else:
        delta.copy_(job.stack.reduce(_rows(job, tile), weights, tile))
    change = job.room.tile("wide", torch.float64, n).copy_(delta)
    delta_sq = float(torch.dot(change, change))
    if job.state_manifest is not None or job.stack.having("step"):
        state = job.state_tile(tile) if job.state_manifest is not None else {}
        stepped, state = job.stack.step(delta, base.to(wire), state, tile, job.moment)
        change.copy_(stepped)
        outputs.state(tile, state)
    new = job.room.tile("next", torch.float64, n).copy_(base)
    base_sq = float(torch.dot(new, new))
    outputs.model(tile, job.room.tile("new", base.dtype, n).copy_(new.sub_(change)))
    return {"tile": tile.index, "delta_sq": delta_sq, "base_sq": base_sq}


def _mean(job: Job, tile: Tile, weights: Tensor) -> Tensor:
    """The weighted mean in fp64, one site's tile in memory at a time."""
    row = job.room.tile("row", DTYPES[tile.spec.wire_dtype], tile.elements)
    return weighted_mean(
        (source.read(tile, job.stack, row) for source in job.sources),
        weights,
        job.room.tile("wide", torch.float64, tile.elements),
    )


def reduce_at_once(args: dict[str, Any]) -> dict[str, Any]:
    """All passes in this worker: a small model costs one call.

    Args:
        args: ``job``, and ``spans``: runs of tiles.

    Returns:
        As of `passes`.
    """
    table = {
        "prepare": prepare,
        "measure_run": measure_run,
        "weigh": weigh,
        "reduce_run": reduce_run,
        "pool": assessment.pool,
    }
    return passes(args["job"], args["spans"], lambda name, items: [table[name](i) for i in items])


def check_blocks(args: dict[str, Any]) -> dict[str, Any]:
    """Decode one encoded contribution and check it: finite, and its norm.

    Args:
        args: ``manifest`` (path), ``covered``, ``stack``, ``header`` (path), ``payload``
            (location), ``site``.

    Returns:
        ``norm`` over parameters, and ``bad``: the first tensor with NaN or infinity, or empty.
    """
    manifest = Manifest.decode(Path(args["manifest"]).read_bytes()).covering(args["covered"])
    stack, room = stack_of(args["stack"]), Room()
    source = open_source(args, manifest)
    try:
        total = 0.0
        for tile in manifest.tiles:
            if tile.spec.kind == "counter":
                continue
            row = room.tile("row", DTYPES[tile.spec.wire_dtype], tile.elements)
            wide = room.tile("wide", torch.float64, tile.elements)
            wide.copy_(source.read(tile, stack, row))
            square = float(torch.dot(wide, wide))
            if not math.isfinite(square):
                return {"norm": None, "bad": tile.spec.name}
            if tile.spec.kind == "parameter":
                total += square
        return {"norm": math.sqrt(total), "bad": ""}
    finally:
        source.reader.close()
