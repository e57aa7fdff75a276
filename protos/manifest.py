"""What the bytes of a model mean: its manifest, and the index of its chunks.

A **manifest** is the ordered list of a model's tensors: name, shape, dtype, kind, group,
placement. Offsets, tiles and sizes follow from it alone. An **index** adds the digests of the
chunks; the digest of an index names the bytes, so that one string in a plan proves the index,
the index proves the manifest and every chunk, and a transfer can be checked, resumed and
repaired chunk by chunk.

Both are canonical JSON (`protos.digest.canonical`). A decoder bounds everything before it
allocates anything, and refuses what is not canonical: there are no slack bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Literal, cast

from protos.digest import canonical, digest, is_digest
from protos.errors import ManifestInvalid

Kind = Literal["parameter", "statistic", "counter"]
"""parameter: delta in fp32 or wider, every hook applies. statistic: floating buffers, plain
weighted mean. counter: integers and booleans, the maximum."""

Placement = Literal["shared", "site", "orchestrator", "frozen"]
"""shared: averaged. site: never leaves the site. orchestrator: lives there only.
frozen: known by digest, found locally or fetched once, never contributed."""

DTYPE_BYTES: dict[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

TILE_ELEMENTS = 1 << 18
"""Elements of a tile, the unit of coding and of reduction (1 MiB of fp32). Tiles never cross a
tensor, and their borders come from the manifest alone, so that any number of workers adds in
the same order."""

CHUNK_BYTES = 1 << 20
"""Bytes of a chunk, the unit of transfer and resumption."""

ALIGNMENT = 64
"""Each tensor starts at a multiple of this many bytes, so that a mapped file can be used in place."""

MAX_TENSORS = 100_000
MAX_NAME_BYTES = 512
MAX_DIMENSIONS = 16
MAX_BYTES = 1 << 44
MAX_ENCODED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a manifest.

    Attributes:
        name: As in the module's ``state_dict``; unique, at most 512 bytes of UTF-8.
        shape: Sizes of the dimensions, each >= 0; () is a scalar.
        dtype: A key of ``DTYPE_BYTES``.
        kind: See ``Kind``.
        group: Name of the weight group; "all" unless a strategy says otherwise.
        placement: See ``Placement``.
        ties: Further names of the same tensor (tied tensors travel once).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: Kind = "parameter"
    group: str = "all"
    placement: Placement = "shared"
    ties: tuple[str, ...] = ()

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes at rest, without padding."""
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def wire_dtype(self) -> str:
        """The dtype of an uncompressed contribution: fp32 or wider, counters as they are."""
        if self.kind == "counter" or self.dtype == "float64":
            return self.dtype
        return "float32"

    def as_json(self) -> dict[str, Any]:
        """The canonical JSON form."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "kind": self.kind,
            "group": self.group,
            "placement": self.placement,
            "ties": list(self.ties),
        }


@dataclass(frozen=True, slots=True)
class Tile:
    """A run of at most ``TILE_ELEMENTS`` elements of one tensor, as tile hooks see it.

    Attributes:
        index: Position in the order of all tiles of the manifest.
        tensor: Position of the tensor in the manifest.
        spec: The tensor.
        start: First element, counted in the flattened tensor.
        stop: One past the last element.
    """

    index: int
    tensor: int
    spec: TensorSpec
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of elements of the tile."""
        return self.stop - self.start

    @property
    def wire_nbytes(self) -> int:
        """Bytes of the tile in an uncompressed contribution."""
        return self.elements * DTYPE_BYTES[self.spec.wire_dtype]


@dataclass(frozen=True)
class Manifest:
    """The ordered tensors of a model, or of the part of it that one artefact holds."""

    tensors: tuple[TensorSpec, ...]

    @cached_property
    def encoded(self) -> bytes:
        """Canonical JSON."""
        return canonical({"version": 1, "tensors": [t.as_json() for t in self.tensors]})

    @cached_property
    def digest(self) -> str:
        """Digest of ``encoded``; both ends must reach the same."""
        return digest(self.encoded)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in the artefact, in bytes."""
        out, at = [], 0
        for tensor in self.tensors:
            out.append(at)
            at += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return tuple(out)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the artefact, padding included."""
        return sum(-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in self.tensors)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles in order; an empty tensor has none."""
        out: list[Tile] = []
        for position, spec in enumerate(self.tensors):
            for start in range(0, spec.elements, TILE_ELEMENTS):
                stop = min(start + TILE_ELEMENTS, spec.elements)
                out.append(Tile(len(out), position, spec, start, stop))
        return tuple(out)

    @cached_property
    def wire_spans(self) -> tuple[tuple[int, int], ...]:
        """Where each tile lies in an uncompressed contribution, in bytes."""
        sizes = (tile.wire_nbytes for tile in self.tiles)
        return tuple(pairwise(accumulate(sizes, initial=0)))

    @cached_property
    def positions(self) -> dict[str, int]:
        """Name to position."""
        return {t.name: i for i, t in enumerate(self.tensors)}

    def __getitem__(self, name: str) -> TensorSpec:
        """The tensor of that name."""
        return self.tensors[self.positions[name]]

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name is in the manifest."""
        return name in self.positions

    def __iter__(self) -> Iterator[TensorSpec]:
        """The tensors in order."""
        return iter(self.tensors)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self.tensors)

    def of(self, *placements: Placement) -> Manifest:
        """The part whose tensors have one of these placements."""
        return Manifest(tuple(t for t in self.tensors if t.placement in placements))

    def covering(self, groups: Iterable[str] | None) -> Manifest:
        """The part in these groups; all of it for None."""
        if groups is None:
            return self
        wanted = set(groups)
        return Manifest(tuple(t for t in self.tensors if t.group in wanted))

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """The manifest of some received bytes.

        Raises:
            ManifestInvalid: Too large, not canonical, or a bound is broken; says which tensor.
        """
        root = _document(data, {"version", "tensors"})
        rows = root["tensors"]
        if root["version"] != 1 or not isinstance(rows, list) or len(rows) > MAX_TENSORS:
            raise ManifestInvalid(f"manifest: version 1 and at most {MAX_TENSORS} tensors expected")
        manifest = cls(tuple(_tensor(i, r) for i, r in enumerate(rows)))
        names = [n for t in manifest for n in (t.name, *t.ties)]
        if len(set(names)) != len(names):
            raise ManifestInvalid("manifest: a tensor name stands twice")
        if manifest.nbytes > MAX_BYTES:
            raise ManifestInvalid(f"manifest: {manifest.nbytes} bytes exceed {MAX_BYTES}")
        if manifest.encoded != data:
            raise ManifestInvalid("manifest: not in canonical form")
        return manifest


@dataclass(frozen=True)
class Index:
    """The digests of an artefact's chunks, and what its bytes mean.

    Attributes:
        manifest: Digest of the manifest of the bytes.
        nbytes: Size of the artefact.
        chunks: Digest of each ``CHUNK_BYTES`` (the last may be shorter), in order.
    """

    manifest: str
    nbytes: int
    chunks: tuple[str, ...]

    @cached_property
    def encoded(self) -> bytes:
        """Canonical JSON."""
        return canonical(
            {
                "version": 1,
                "manifest": self.manifest,
                "nbytes": self.nbytes,
                "chunk_bytes": CHUNK_BYTES,
                "chunks": list(self.chunks),
            }
        )

    @cached_property
    def digest(self) -> str:
        """The name of the artefact."""
        return digest(self.encoded)

    def span(self, chunk: int) -> tuple[int, int]:
        """First byte of a chunk and one past its last."""
        return chunk * CHUNK_BYTES, min((chunk + 1) * CHUNK_BYTES, self.nbytes)

    @classmethod
    def decode(cls, data: bytes) -> Index:
        """The index of some received bytes.

        Raises:
            ManifestInvalid: Too large, not canonical, or a bound is broken.
        """
        root = _document(data, {"version", "manifest", "nbytes", "chunk_bytes", "chunks"})
        nbytes, chunks = root["nbytes"], root["chunks"]
        if root["version"] != 1 or root["chunk_bytes"] != CHUNK_BYTES:
            raise ManifestInvalid(f"index: version 1 with chunks of {CHUNK_BYTES} bytes expected")
        if not _count(nbytes, MAX_BYTES) or not isinstance(chunks, list):
            raise ManifestInvalid("index: nbytes or chunks out of range")
        if len(chunks) != -(-nbytes // CHUNK_BYTES):
            raise ManifestInvalid(f"index: {len(chunks)} chunks do not make {nbytes} bytes")
        if not is_digest(root["manifest"]) or not all(is_digest(c) for c in chunks):
            raise ManifestInvalid("index: a digest is not 64 hexadecimal digits")
        index = cls(root["manifest"], nbytes, tuple(chunks))
        if index.encoded != data:
            raise ManifestInvalid("index: not in canonical form")
        return index


def _document(data: bytes, keys: set[str]) -> dict[str, Any]:
    if len(data) > MAX_ENCODED_BYTES:
        raise ManifestInvalid(f"manifest or index of {len(data)} bytes exceeds {MAX_ENCODED_BYTES}")
    try:
        root = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"manifest or index is not JSON: {type(error).__name__}") from None
    if not isinstance(root, dict) or set(root) != keys:
        raise ManifestInvalid(f"manifest or index must have the keys {sorted(keys)}")
    return root


def _count(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _name(value: object) -> bool:
    if not isinstance(value, str) or not value:
        return False
    try:
        return len(value.encode()) <= MAX_NAME_BYTES
    except UnicodeEncodeError:  # a lone surrogate from a JSON escape
        return False


def _tensor(position: int, row: object) -> TensorSpec:
    where = f"manifest: tensor {position}"
    fields = {"name", "shape", "dtype", "kind", "group", "placement", "ties"}
    if not isinstance(row, dict) or set(row) != fields:
        raise ManifestInvalid(f"{where} must have the keys {sorted(fields)}")
    if not _name(row["name"]) or not _name(row["group"]):
        raise ManifestInvalid(f"{where}: name and group must be 1 to {MAX_NAME_BYTES} bytes")
    where = f"{where} ({row['name']})"
    shape, ties = row["shape"], row["ties"]
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ManifestInvalid(f"{where}: at most {MAX_DIMENSIONS} dimensions")
    if not all(_count(s, MAX_BYTES) for s in shape):
        raise ManifestInvalid(f"{where}: a dimension is out of range")
    if not isinstance(row["dtype"], str) or row["dtype"] not in DTYPE_BYTES:
        raise ManifestInvalid(f"{where}: dtype must be one of {sorted(DTYPE_BYTES)}")
    if math.prod(shape) * DTYPE_BYTES[row["dtype"]] > MAX_BYTES:
        raise ManifestInvalid(f"{where}: larger than {MAX_BYTES} bytes")
    if row["kind"] not in ("parameter", "statistic", "counter"):
        raise ManifestInvalid(f"{where}: unknown kind")
    if (row["kind"] == "counter") == row["dtype"].startswith(("float", "bfloat")):
        raise ManifestInvalid(f"{where}: a {row['kind']} can't have the dtype {row['dtype']}")
    if row["placement"] not in ("shared", "site", "orchestrator", "frozen"):
        raise ManifestInvalid(f"{where}: unknown placement")
    if not isinstance(ties, list) or len(ties) > 64 or not all(_name(t) for t in ties):
        raise ManifestInvalid(f"{where}: ties must be at most 64 names")
    return TensorSpec(
        name=row["name"],
        shape=tuple(shape),
        dtype=row["dtype"],
        kind=cast(Kind, row["kind"]),
        group=row["group"],
        placement=cast(Placement, row["placement"]),
        ties=tuple(ties),
    )
