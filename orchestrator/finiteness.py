"""Are all numbers of a payload finite? Looked up in the file, a block at a time, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import numpy as np

from protos.contribution import Header
from protos.errors import ContributionRefused, ManifestInvalid
from protos.manifest import MAX_ENCODED_BYTES, Manifest

BLOCK_BYTES = 1 << 20

PLACES_BESIDE = ("frozen", "orchestrator")
"""Parts of a first model that come beside the shared one."""

Span = tuple[str, str, int, int, bool]
"""Tensor, dtype, first byte, one past the last, whether it counts for the norm."""


def tensor_spans(header: Header, covered: Manifest) -> list[Span]:
    """The floating tensors of a raw contribution."""
    spans: list[Span] = []
    for tile, (start, stop) in zip(covered.tiles, header.block_spans(covered), strict=True):
        spec = tile.spec
        if spec.kind == "counter":
            continue
        if spans and spans[-1][0] == spec.name:
            spans[-1] = (*spans[-1][:3], stop, spans[-1][4])
        else:
            spans.append((spec.name, spec.wire_dtype, start, stop, spec.kind == "parameter"))
    return spans


def side_spans(header: Header, covered: Manifest) -> list[Span]:
    """The floating side payloads of a contribution."""
    where = header.payload_spans(covered)
    return [(p.name, p.dtype, *where[p.name], False) for p in header.payloads if _floats(p.dtype)]


def first_model_spans(header: Header, payload: Path, nbytes: int) -> list[Span]:
    """The floating tensors of a whole model, where its own manifests say that they lie.

    Raises:
        ContributionRefused: A manifest does not describe the bytes that it came with.
    """
    sides = header.tail_spans(nbytes)
    begin = min(start for start, _ in sides.values())

    def manifest_at(name: str) -> Manifest:
        start, stop = sides[name]
        with payload.open("rb") as file:
            file.seek(start)
            return Manifest.decode(file.read(min(stop - start, MAX_ENCODED_BYTES + 1)))

    found: list[Span] = []
    for place in ("", *PLACES_BESIDE):
        key = f"init/{place}_manifest" if place else "init/manifest"
        if key not in sides:
            continue
        try:
            manifest = manifest_at(key)
        except ManifestInvalid as error:
            raise ContributionRefused(f"site {header.site}: {error.message}") from None
        at, end = sides.get(f"init/{place}", (0, 0)) if place else (0, begin)
        if end - at != manifest.nbytes or not (place or manifest.digest == header.manifest):
            raise ContributionRefused(
                f"site {header.site}: its first model has {end - at} bytes where its {place} manifest "
                f"says {manifest.nbytes}, or another manifest than the header says",
                site=header.site,
            )
        for spec, offset in zip(manifest, manifest.offsets, strict=True):
            if _floats(spec.dtype):
                start = at + offset
                found.append((spec.name, spec.dtype, start, start + spec.nbytes, False))
    return found


def _floats(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat"))


NARROW = {
    "bfloat16": (np.uint16, 0x7F80),
    "float8_e5m2": (np.uint8, 0x7C),
    "float8_e4m3fn": (np.uint8, 0x7F),
}
"""Where numpy has no such dtype: its bits, and those that are all set in NaN (and infinity)."""


def first_bad(file: FileIO, spans: list[Span]) -> tuple[float, str]:
    """Sum of squares over the spans of a payload that count, and the first tensor that is not finite.

    A sum of squares that is finite proves that all are (at a third of a scan's cost); one that is
    not may have overflowed, so the block is then looked at. Neighbours of one kind are read as one.
    """
    total = 0.0
    for several in _neighbours(spans):
        _, dtype, start, _, counts = several[0]
        square = _squares(file, dtype, start, several[-1][3])
        if math.isnan(square):
            bad = (s[0] for s in several if math.isnan(_squares(file, s[1], s[2], s[3])))
            return math.nan, next(bad)
        total += square if counts else 0.0
    return total, ""


def _neighbours(spans: list[Span]) -> Iterator[list[Span]]:
    """Spans of one dtype, all of which count or none, that follow each other without a gap."""
    several: list[Span] = []
    for span in spans:
        if several:
            _, dtype, _, stop, counts = several[-1]
            if (dtype, stop, counts) != (span[1], span[2], span[4]):
                yield several
                several = []
        several.append(span)
    if several:
        yield several


def _squares(file: FileIO, dtype: str, start: int, stop: int) -> float:
    """The sum of squares of some numbers in a file, 0 for narrow dtypes; NaN if not all are finite."""
    file.seek(start)
    total, left = 0.0, stop - start
    buffer = memoryview(bytearray(min(BLOCK_BYTES, left)))
    while left > 0:
        data = buffer[: min(BLOCK_BYTES, left)]
        if not _fill(file, data):
            return math.nan
        left -= len(data)
        if dtype in NARROW:
            width, mask = NARROW[dtype]
            if bool((np.frombuffer(data, width) & mask == mask).any()):
                return math.nan
            continue
        values = np.frombuffer(data, dtype=np.dtype(dtype))
        with np.errstate(over="ignore", invalid="ignore"):
            square = float(np.dot(values, values))
        if not math.isfinite(square):
            if not bool(np.isfinite(values).all()):
                return math.nan
            wide = values.astype(np.float64)
            square = float(np.dot(wide, wide))
        total += square
    return total


def _fill(file: FileIO, buffer: memoryview) -> bool:
    """Read exactly that many bytes; False where the file ends before."""
    while buffer:
        got = file.readinto(buffer)
        if not got:
            return False
        buffer = buffer[got:]
    return True
