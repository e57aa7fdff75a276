"""What all runs of one reduction share: open inputs, the stack, and memory for one tile of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orchestrator.arithmetic.output import Output
from orchestrator.arithmetic.places import Reader, open_place
from orchestrator.arithmetic.planning import stack_of
from protos.contribution import Header
from protos.errors import ContributionRefused
from protos.manifest import DTYPE_BYTES, TILE_ELEMENTS, Manifest, Tile
from protos.tensors import DTYPES, view_bytes
from strategies.context import Moment
from strategies.stack import Stack

WIDEST = 8


@dataclass(frozen=True)
class Source:
    """One site's contribution.

    Attributes:
        site: Its name.
        reader: Of the payload.
        spans: Where each covered tile lies in it, by the tile's number.
        codec: What its parameters are encoded with; empty for raw.
    """

    site: str
    reader: Reader
    spans: dict[int, tuple[int, int]]
    codec: str

    def read(self, tile: Tile, stack: Stack, out: Tensor | None = None) -> Tensor:
        """The tile's values, fp32 or wider (counters as they are), in ``out`` if it is given.

        Raises:
            ContributionRefused: A block has another codec or another size than it should.
        """
        if out is None:
            out = torch.empty(tile.elements, dtype=DTYPES[tile.spec.wire_dtype])
        start, stop = self.spans[tile.index]
        if not self.codec or tile.spec.kind != "parameter":
            if stop - start != tile.wire_nbytes:
                self._refuse(tile, f"{stop - start} bytes where {tile.wire_nbytes} belong")
            self.reader.read_into(view_bytes(out), start, stop)
            return out
        if stack.codec is None or stack.codec.name != self.codec:
            raise ContributionRefused(
                f"site {self.site}: encoded with {self.codec}, which is not this run's codec",
                site=self.site,
            )
        block = bytearray(stop - start)
        self.reader.read_into(memoryview(block), start, stop)
        try:
            values = stack.decode(bytes(block), tile)
        except ContributionRefused as error:  # a codec does not know whose block it is
            raise ContributionRefused(
                f"site {self.site}, {error.message}", **{**error.facts, "site": self.site}
            ) from None
        if values.shape != (tile.elements,):
            shape = list(values.shape)
            self._refuse(tile, f"a block decodes to {shape} where {tile.elements} elements belong")
        return out.copy_(values)

    def _refuse(self, tile: Tile, what: str) -> None:
        name = tile.spec.name
        raise ContributionRefused(
            f"site {self.site}, tensor {name}: {what}", site=self.site, tensor=name
        )


def open_source(row: dict[str, Any], covered: Manifest, numbers: list[int] | None = None) -> Source:
    """A contribution of a job.

    Args:
        row: ``site``, ``payload`` (location), ``header`` (path).
        covered: What contributions of the round cover.
        numbers: The number that each tile of ``covered`` has in the whole manifest; its own if not
            given.
    """
    header = Header.decode(Path(row["header"]).read_bytes())
    spans = header.block_spans(covered)
    names = range(len(spans)) if numbers is None else numbers
    by_tile = dict(zip(names, spans, strict=True))
    return Source(row["site"], open_place(row["payload"]), by_tile, header.codec)


class Room:
    """Memory of one run, taken once: what is held of a tile at the same time, under a name.

    Fresh memory for every tile would be given back to the kernel and cleared again each time.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def tile(self, name: str, dtype: torch.dtype, elements: int) -> Tensor:
        """Room for the elements of a tile; its content is left from before."""
        return self._bytes(name, TILE_ELEMENTS * WIDEST).view(dtype)[:elements]

    def rows(self, n: int, dtype: torch.dtype, elements: int) -> Tensor:
        """Room for a tile of n sites, (n, elements)."""
        held = self._bytes("rows", n * TILE_ELEMENTS * dtype.itemsize)
        return held.view(dtype)[: n * elements].view(n, elements)

    def _bytes(self, name: str, size: int) -> Tensor:
        held = self._held.get(name)
        if held is None or len(held) < size:
            held = self._held[name] = torch.empty(size, dtype=torch.uint8)
        return held


@dataclass(frozen=True)
class Job:
    """A reduction as a worker sees it.

    The document that it is opened from, JSON:

        manifest, base      path of the shared manifest; location of the round's base
        stack, whole_stack  strategies that act in the round; all of the run
        covered, groups     groups that contributions cover (null for all); all groups
        round, seed         for `strategies.context.Moment`
        sources             in site-id order: site, payload (location), header (path)
        out                 path of the next model
        cold                path of a model that is not read any more (empty for none): see
                            `output.release_pages`
        state               outer state: manifest and out (paths), before (location, empty for
                            none) and before_manifest (digest)
        cohort, pool        arguments of `reduction.weigh` and `assessment.pool`
    """

    manifest: Manifest
    stack: Stack
    whole_stack: Stack
    moment: Moment
    base: Reader
    sources: tuple[Source, ...]
    groups: tuple[str, ...]
    state_manifest: Manifest | None
    state_before: Reader | None
    room: Room = field(default_factory=Room)

    @classmethod
    def open(cls, raw: dict[str, Any]) -> Job:
        """Open the inputs of a job's document."""
        manifest = Manifest.decode(Path(raw["manifest"]).read_bytes())
        covered = manifest.covering(raw["covered"])
        order = {(t.spec.name, t.start): t.index for t in manifest.tiles}
        numbers = [order[(t.spec.name, t.start)] for t in covered.tiles]
        state, state_manifest, before = raw["state"], None, None
        if (path := Path(state["manifest"])).exists():
            state_manifest = Manifest.decode(path.read_bytes())
            # Of another model, or of another stack: then the memory begins empty.
            if state["before"] and state["before_manifest"] == state_manifest.digest:
                before = open_place(state["before"])
        return cls(
            manifest=manifest,
            stack=stack_of(raw["stack"]),
            whole_stack=stack_of(raw["whole_stack"]),
            moment=Moment(round=raw["round"], seed=raw["seed"], sites=len(raw["sources"])),
            base=open_place(raw["base"]),
            sources=tuple(open_source(row, covered, numbers) for row in raw["sources"]),
            groups=tuple(raw["groups"]),
            state_manifest=state_manifest,
            state_before=before,
        )

    def close(self) -> None:
        """Close all inputs."""
        for reader in (self.base, self.state_before, *(s.reader for s in self.sources)):
            if reader is not None:
                reader.close()

    def covers(self, tile: Tile) -> bool:
        """Whether contributions say anything about a tile."""
        return bool(self.sources) and tile.index in self.sources[0].spans

    def base_tile(self, tile: Tile) -> Tensor:
        """The base's values, in its own dtype."""
        out = self.room.tile("base", DTYPES[tile.spec.dtype], tile.elements)
        return _read(self.base, self.manifest, tile.tensor, tile, out)

    @cached_property
    def state_keys(self) -> tuple[str, ...]:
        """What strategies remember for each parameter, "strategy.key"."""
        tensors = self.state_manifest.tensors if self.state_manifest else ()
        return tuple(dict.fromkeys(t.name.split("/", 1)[0] for t in tensors))

    def state_tile(self, tile: Tile) -> dict[str, Tensor]:
        """What was remembered of a parameter's tile."""
        if self.state_before is None or self.state_manifest is None:
            return self.whole_stack.init_state(tile)
        out = {}
        for key in self.state_keys:
            position = self.state_manifest.positions[f"{key}/{tile.spec.name}"]
            dtype = DTYPES[self.state_manifest.tensors[position].dtype]
            held = self.room.tile(f"state {key}", dtype, tile.elements)
            out[key] = _read(self.state_before, self.state_manifest, position, tile, held)
        return out


def place_in(manifest: Manifest, position: int, tile: Tile) -> tuple[int, int]:
    """First byte, and one past the last, of a tile's range of a tensor in an artefact."""
    width = DTYPE_BYTES[manifest.tensors[position].dtype]
    start = manifest.offsets[position] + tile.start * width
    return start, start + tile.elements * width


def _read(reader: Reader, manifest: Manifest, position: int, tile: Tile, out: Tensor) -> Tensor:
    reader.read_into(view_bytes(out), *place_in(manifest, position, tile))
    return out


class Outputs:
    """What a run writes: its part of the next model, and of each kind of outer state.

    Args:
        job: The opened job.
        raw: Its document.
    """

    def __init__(self, job: Job, raw: dict[str, Any]) -> None:
        self._job = job
        self._model = Output(raw["out"], job.manifest.nbytes)
        size = job.state_manifest.nbytes if job.state_manifest else 0
        # One for each key: they lie one behind the other, so each is written from front to back.
        self._state = {key: Output(raw["state"]["out"], size) for key in job.state_keys}

    def model(self, tile: Tile, values: Tensor) -> None:
        """Write a tile of the next model."""
        start, _ = place_in(self._job.manifest, tile.tensor, tile)
        self._model.write(view_bytes(values), start)

    def state(self, tile: Tile, state: dict[str, Tensor]) -> None:
        """Write what is remembered of a parameter's tile, if anything is."""
        if manifest := self._job.state_manifest:
            for key, output in self._state.items():
                position = manifest.positions[f"{key}/{tile.spec.name}"]
                values = state[key].to(DTYPES[manifest.tensors[position].dtype])
                output.write(view_bytes(values), place_in(manifest, position, tile)[0])

    def close(self, *, sync: bool) -> dict[str, list[tuple[int, str]]]:
        """Close the files; gives the digests of the chunks that lie wholly in this run."""
        every = (self._model, *self._state.values())
        for output in every:
            output.close(sync=sync)
        state = [chunk for output in self._state.values() for chunk in output.chunks]
        return {"chunks": self._model.chunks, "state_chunks": state}
