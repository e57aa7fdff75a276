"""The reduction: from the sites' spooled updates to the next model, tile by tile.

Each call handles a run of consecutive tiles. It reads their ranges of the base and of every
contribution straight from the files, decodes, weighs, reduces and steps in site-id order, and
writes the same ranges of the next model: memory is O(sites x tile), whatever the model's size.

The bits don't depend on how tiles are grouped into runs, or on how many workers there are: tile
borders come from the manifest alone, every worker uses one torch thread, the mean is accumulated in
site order in fp64 and rounded once, sums per tile are fp64 and combined in tile order by the caller.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.arithmetic.planning import load_payload, stack_of
from protos.contribution import Header
from protos.errors import ContributionRefused
from protos.manifest import DTYPE_BYTES, Manifest, TensorSpec, Tile
from protos.tensors import DTYPES, dtype_name, from_bytes, view_bytes
from strategies.context import Cohort, Moment
from strategies.stack import Stack, weighted_mean


@dataclass
class Source:
    """One site's contribution: an open file, and where each covered tile lies in it."""

    site: str
    fd: int
    spans: dict[int, tuple[int, int]]
    codec: str
    weights: list[float]

    def read(self, tile: Tile, stack: Stack) -> Tensor:
        """The tile's values, fp32 or wider (counters as they are)."""
        start, stop = self.spans[tile.index]
        data = os.pread(self.fd, stop - start, start)
        if self.codec and tile.spec.kind == "parameter":
            if stack.codec is None or stack.codec.name != self.codec:
                raise ContributionRefused(
                    f"site {self.site}: encoded with {self.codec}, which is not this run's codec",
                    site=self.site,
                )
            values = stack.decode(data, tile)
            if values.shape != (tile.elements,):
                raise ContributionRefused(
                    f"site {self.site}, tensor {tile.spec.name}: a block decodes to "
                    f"{list(values.shape)} where {tile.elements} elements belong",
                    site=self.site,
                    tensor=tile.spec.name,
                )
            return values.to(DTYPES[tile.spec.wire_dtype])
        return from_bytes(data, tile.spec.wire_dtype, (tile.elements,))


@dataclass
class Job:
    """What all runs of one reduction share; opened once per worker."""

    manifest: Manifest
    stack: Stack
    whole_stack: Stack
    moment: Moment
    base_fd: int
    out_fd: int
    sources: list[Source]
    groups: list[str]
    state_manifest: Manifest | None
    state_in: int
    state_out: int

    def close(self) -> None:
        """Close all files."""
        for fd in (self.base_fd, self.out_fd, self.state_in, self.state_out):
            if fd >= 0:
                os.close(fd)
        for source in self.sources:
            os.close(source.fd)


def _open_job(path: str) -> Job:
    raw = json.loads(Path(path).read_bytes())
    manifest = Manifest.decode(Path(raw["manifest"]).read_bytes())
    stack = stack_of(raw["stack"])
    covered = manifest.covering(raw["covered"])
    order = {(t.spec.name, t.start): t.index for t in manifest.tiles}
    sources = []
    for row in raw["sources"]:
        header = Header.decode(Path(row["header"]).read_bytes())
        spans = header.block_spans(covered)
        by_tile = {
            order[(t.spec.name, t.start)]: s for t, s in zip(covered.tiles, spans, strict=True)
        }
        fd = os.open(row["payload"], os.O_RDONLY)
        sources.append(Source(row["site"], fd, by_tile, header.codec, row.get("weights", [])))
    state_manifest = None
    state_in = state_out = -1
    if raw.get("state_manifest"):
        state_manifest = Manifest.decode(Path(raw["state_manifest"]).read_bytes())
        state_out = os.open(raw["state_out"], os.O_RDWR)
        if raw.get("state_in"):
            state_in = os.open(raw["state_in"], os.O_RDONLY)
    return Job(
        manifest=manifest,
        stack=stack,
        whole_stack=stack_of(raw["whole_stack"]),
        moment=Moment(round=raw["round"], seed=raw["seed"], sites=len(sources)),
        base_fd=os.open(raw["base"], os.O_RDONLY),
        out_fd=os.open(raw["out"], os.O_RDWR) if raw.get("out") else -1,
        sources=sources,
        groups=list(raw["groups"]),
        state_manifest=state_manifest,
        state_in=state_in,
        state_out=state_out,
    )


def _read(fd: int, manifest: Manifest, position: int, start: int, stop: int) -> Tensor:
    spec = manifest.tensors[position]
    width = DTYPE_BYTES[spec.dtype]
    data = os.pread(fd, (stop - start) * width, manifest.offsets[position] + start * width)
    return from_bytes(data, spec.dtype, (stop - start,))


def _write(fd: int, manifest: Manifest, position: int, start: int, values: Tensor) -> None:
    spec = manifest.tensors[position]
    at = manifest.offsets[position] + start * DTYPE_BYTES[spec.dtype]
    view = view_bytes(values)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


def _tiles(job: Job, args: dict[str, Any]) -> Iterator[Tile]:
    yield from job.manifest.tiles[args["first"] : args["end"]]


def measure_run(args: dict[str, Any]) -> dict[str, Any]:
    """Pass 1: per tile the Gram matrix of the parameters' updates, (n, n) fp64.

    Args:
        args: ``job`` (path), ``first``, ``end`` (tile numbers).
    """
    torch.set_num_threads(1)
    job = _open_job(args["job"])
    try:
        out = []
        for tile in _tiles(job, args):
            if tile.spec.kind != "parameter" or not _covered(job, tile):
                continue
            rows = torch.stack([s.read(tile, job.stack).double() for s in job.sources])
            gram = [[float((a * b).sum()) for b in rows] for a in rows]
            out.append({"tile": tile.index, "gram": gram})
        return {"tiles": out}
    finally:
        job.close()


def _covered(job: Job, tile: Tile) -> bool:
    return bool(job.sources) and tile.index in job.sources[0].spans


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
    cohort = Cohort(
        sites=tuple(args["sites"]),
        examples=examples,
        losses=losses,
        staleness=torch.tensor(args["staleness"], dtype=torch.int64),
        payloads={
            name: torch.stack([load_payload(spec) for spec in specs])
            for name, specs in args.get("payloads", {}).items()
        },
        groups=tuple(groups),
        norms=gram.diagonal().clamp(min=0).sqrt() if gram is not None else None,
        gram=gram,
    )
    return {"weights": stack.weigh(cohort).tolist()}


def reduce_run(args: dict[str, Any]) -> dict[str, Any]:
    """Pass 2: reduce and step a run of tiles and write them.

    Args:
        args: ``job`` (path), ``first``, ``end`` (tile numbers).

    Returns:
        ``tiles``: per parameter tile its number and the fp64 sums of squares of the reduced update
        (before outer step) and of the base.
    """
    torch.set_num_threads(1)
    job = _open_job(args["job"])
    try:
        out = []
        for tile in _tiles(job, args):
            base = _read(job.base_fd, job.manifest, tile.tensor, tile.start, tile.stop)
            if not _covered(job, tile):
                _write(job.out_fd, job.manifest, tile.tensor, tile.start, base)
                if job.state_manifest is not None and tile.spec.kind == "parameter":
                    _write_state(job, tile, _state(job, tile))
                continue
            rows = [s.read(tile, job.stack) for s in job.sources]
            if tile.spec.kind == "counter":
                new = torch.stack(rows).amax(0)
            elif tile.spec.kind == "statistic":
                group = job.groups.index(tile.spec.group)
                weights = torch.tensor([s.weights[group] for s in job.sources], dtype=torch.float64)
                total = weights.sum()
                new = base
                if total > 0:
                    new = weighted_mean(torch.stack(rows), weights / total).to(base.dtype)
            else:
                new, delta = _reduce_tile(job, tile, base, rows)
                out.append(
                    {
                        "tile": tile.index,
                        "delta_sq": float(delta.double().square().sum()),
                        "base_sq": float(base.double().square().sum()),
                    }
                )
            _write(job.out_fd, job.manifest, tile.tensor, tile.start, new)
        os.fsync(job.out_fd)
        if job.state_out >= 0:
            os.fsync(job.state_out)
        return {"tiles": out}
    finally:
        job.close()


def _reduce_tile(job: Job, tile: Tile, base: Tensor, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    group = job.groups.index(tile.spec.group)
    weights = torch.tensor([s.weights[group] for s in job.sources], dtype=torch.float64)
    wire = DTYPES[tile.spec.wire_dtype]
    delta = job.stack.reduce(torch.stack(rows), weights, tile).to(wire)
    state = _state(job, tile) if job.state_manifest is not None else {}
    change, state = job.stack.step(delta, base.to(wire), state, tile, job.moment)
    if job.state_manifest is not None:
        _write_state(job, tile, state)
    return (base.double() - change.double()).to(base.dtype), delta


def _state(job: Job, tile: Tile) -> dict[str, Tensor]:
    if job.state_in < 0:
        return job.whole_stack.init_state(tile)
    out = {}
    if manifest := job.state_manifest:
        for key in _state_keys(manifest):
            position = manifest.positions[f"{key}/{tile.spec.name}"]
            out[key] = _read(job.state_in, manifest, position, tile.start, tile.stop)
    return out


def _write_state(job: Job, tile: Tile, state: dict[str, Tensor]) -> None:
    if manifest := job.state_manifest:
        for key in _state_keys(manifest):
            position = manifest.positions[f"{key}/{tile.spec.name}"]
            expected = DTYPES[manifest.tensors[position].dtype]
            _write(job.state_out, manifest, position, tile.start, state[key].to(expected))


@lru_cache(maxsize=4)
def _state_keys(manifest: Manifest) -> tuple[str, ...]:
    return tuple(dict.fromkeys(t.name.split("/", 1)[0] for t in manifest))


def state_manifest(args: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the outer state of a stack: per key one flat tensor for each parameter.

    Args:
        args: ``stack`` and ``manifest`` (path).

    Returns:
        ``manifest``: its JSON text; empty if the stack keeps no outer state.
    """
    manifest = Manifest.decode(Path(args["manifest"]).read_bytes())
    stack = stack_of(args["stack"])
    specs = []
    seen: dict[str, dict[str, str]] = {}
    for tile in manifest.tiles:
        if tile.spec.kind == "parameter" and tile.start == 0:
            seen[tile.spec.name] = {k: dtype_name(v) for k, v in stack.init_state(tile).items()}
    keys = dict.fromkeys(k for state in seen.values() for k in state)
    for key in keys:
        for name, state in seen.items():
            size = manifest[name].elements
            specs.append(TensorSpec(f"{key}/{name}", (size,), state[key], "statistic"))
    return {"manifest": Manifest(tuple(specs)).encoded.decode() if specs else ""}


def check_blocks(args: dict[str, Any]) -> dict[str, Any]:
    """Decode one encoded contribution and check it: finite, and its norm.

    Args:
        args: ``manifest`` (path), ``covered``, ``stack``, ``header``, ``payload`` (paths), ``site``.

    Returns:
        ``norm`` over parameters, and ``bad``: the first tensor with NaN or infinity, or empty.
    """
    torch.set_num_threads(1)
    manifest = Manifest.decode(Path(args["manifest"]).read_bytes()).covering(args["covered"])
    header = Header.decode(Path(args["header"]).read_bytes())
    stack = stack_of(args["stack"])
    spans = dict(enumerate(header.block_spans(manifest)))
    fd = os.open(args["payload"], os.O_RDONLY)
    try:
        source = Source(args["site"], fd, spans, header.codec, [])
        total = 0.0
        for tile in manifest.tiles:
            if tile.spec.kind == "counter":
                continue
            square = float(source.read(tile, stack).double().square().sum())
            if not math.isfinite(square):
                return {"norm": None, "bad": tile.spec.name}
            if tile.spec.kind == "parameter":
                total += square
        return {"norm": math.sqrt(total), "bad": ""}
    finally:
        os.close(fd)
