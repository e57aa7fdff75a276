"""A contribution's header: everything about it except its bytes, complete before the first is sent.

The payload is one artefact (`protos.manifest.Index`): the encoded tiles of the covered tensors in
the manifest's order, without padding, then the side payloads. The header says how long each part is,
so that a reducer reads any tile of any site with one range read. The site signs the header's bytes
as they are carried, and the ledger keeps them.

A contribution of the kind init carries a whole model instead of tiles: the artefact of its manifest,
in the tensors' own dtypes and with their padding, and the manifest itself among the side payloads
("init/manifest"; "init/frozen" and "init/frozen_manifest" if a part is frozen).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from protos.digest import digest
from protos.errors import ManifestInvalid
from protos.manifest import DTYPE_BYTES, MAX_BYTES, Manifest
from protos.plan import Digest, Frozen, Name, first_problem

MAX_HEADER_BYTES = 16 << 20
MAX_EXAMPLES = 1 << 40
MAX_METRICS = 256
MAX_PAYLOADS = 1024

MAX_BLOCK_HEAD = 256
"""An encoded block has at most twice the bytes of its raw tile and so many more: what a site may
make the orchestrator spool and decode follows from the manifest."""

Statistic = Literal["sum", "mean by count", "concatenate", "keep per site"]
Merge = Statistic | Literal["condensed"]

ASSESSMENTS = frozenset({"assess", "baseline", "reassess"})
"""Kinds of plans that are answered with side payloads only."""


class PayloadSpec(Frozen):
    """A named tensor beside the update, and how the orchestrator merges it over the sites.

    Attributes:
        name: "strategy/name".
        shape: At most 16 dimensions.
        dtype: As in a manifest.
        merge: sum equals the same statistic on the union of the data; mean by count weighs with
            the examples; concatenate joins along the first axis in site order; keep per site
            does not merge; condensed is concatenate for examples that were made from a site's
            data, which a site's policy treats apart.
    """

    name: str = Field(min_length=3, max_length=256, pattern=r"^[a-z0-9_]+/.+$")
    shape: tuple[int, ...] = Field(max_length=16)
    dtype: str
    merge: Merge = "sum"

    @model_validator(mode="after")
    def _bounded(self) -> PayloadSpec:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {sorted(DTYPE_BYTES)}")
        if any(not 0 <= s <= MAX_BYTES for s in self.shape) or self.nbytes > MAX_BYTES:
            raise ValueError("shape out of range")
        return self

    @property
    def nbytes(self) -> int:
        """Bytes in the payload."""
        size = DTYPE_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


class Header(Frozen):
    """What a site says of its contribution, signed.

    Attributes:
        plan_id: `Plan.id` of the plan that it answers.
        work_digest: `Plan.work_digest` of that plan.
        site: Who contributes; must be the name in the certificate.
        kind: As in the plan.
        base: The base that it was trained from; one that the plan accepts.
        manifest: Digest of the manifest of the covered tensors.
        index: Digest of the payload's index (size and chunk digests).
        codec: Name of the strategy that encoded the parameters; empty for raw.
        blocks: Bytes of each tile's block in order; empty for raw, where they follow from the manifest.
        payloads: Side payloads, in the order of their bytes.
        examples: Training examples at the site: the weight of an average, never times epochs. Of
            partial work the share of them that belongs to the share of the work that was done.
        steps: Optimizer steps made, >= 0.
        epochs: Passes over the data made, >= 0.
        partial: The work was cut before the deadline, see ``Finish`` in protos/v1/site.proto.
        metrics: Numbers that the site's policy lets out, such as the mean training loss.
        seconds: Wall seconds by phase (preparing, fetching, training, encoding).
        task_digest: Digest of the task's source at the site.
        packages: Names and versions that decide the bits (torch, the CPU capability, farflung).
    """

    plan_id: str = Field(max_length=256)
    work_digest: Digest
    site: Name
    kind: Literal["train", "init", "assess", "baseline", "reassess"] = "train"
    base: Digest | Literal[""] = ""
    manifest: Digest
    index: Digest
    codec: str = Field("", max_length=64)
    blocks: tuple[int, ...] = ()
    payloads: tuple[PayloadSpec, ...] = Field((), max_length=MAX_PAYLOADS)
    examples: int = Field(ge=0, le=MAX_EXAMPLES)
    steps: int = Field(0, ge=0, le=MAX_EXAMPLES)
    epochs: float = Field(0.0, ge=0, le=1e9)
    partial: bool = False
    metrics: dict[str, float] = Field({}, max_length=MAX_METRICS)
    seconds: dict[str, float] = Field({}, max_length=16)
    task_digest: str = Field("", max_length=64)
    packages: dict[str, str] = Field({}, max_length=64)

    def done(self, unit: str) -> float:
        """How much local work is in it, in a unit of `Work`; 0 where it does not tell (tokens)."""
        known = {
            "epochs": self.epochs,
            "steps": self.steps,
            "seconds": self.seconds.get("training"),
        }
        return float(known.get(unit) or 0.0)

    @cached_property
    def payload_names(self) -> tuple[str, ...]:
        """Names of the side payloads, in order."""
        return tuple(p.name for p in self.payloads)

    def block_spans(self, manifest: Manifest) -> Sequence[tuple[int, int]]:
        """Where the block of each tile of the covered manifest lies in the payload.

        Raises:
            ManifestInvalid: The block table does not fit the manifest.
        """
        if self.kind in ASSESSMENTS:
            return []
        if self.kind == "init":
            starts = [
                manifest.offsets[t.tensor] + t.start * DTYPE_BYTES[t.spec.dtype]
                for t in manifest.tiles
            ]
            sizes = [t.elements * DTYPE_BYTES[t.spec.dtype] for t in manifest.tiles]
            return [(a, a + size) for a, size in zip(starts, sizes, strict=True)]
        if not self.codec:
            return manifest.wire_spans
        if len(self.blocks) != len(manifest.tiles):
            raise ManifestInvalid(
                f"site {self.site}: {len(self.blocks)} blocks for {len(manifest.tiles)} tiles"
            )
        spans, at = [], 0
        for tile, size in zip(manifest.tiles, self.blocks, strict=True):
            if not 0 <= size <= 2 * tile.wire_nbytes + MAX_BLOCK_HEAD:
                raise ManifestInvalid(
                    f"site {self.site}, tensor {tile.spec.name}: a block of {size} bytes for "
                    f"{tile.elements} elements",
                    site=self.site,
                    tensor=tile.spec.name,
                )
            spans.append((at, at + size))
            at += size
        return spans

    def payload_spans(self, manifest: Manifest) -> dict[str, tuple[int, int]]:
        """Where each side payload lies in the payload artefact."""
        return self.tail_spans(self.expected_nbytes(manifest))

    def tail_spans(self, nbytes: int) -> dict[str, tuple[int, int]]:
        """Where each side payload lies in a payload artefact of that size: they are its end.

        Raises:
            ManifestInvalid: They are longer than that.
        """
        at = nbytes - sum(p.nbytes for p in self.payloads)
        if at < 0:
            raise ManifestInvalid(f"site {self.site}: the side payloads exceed {nbytes} bytes")
        out = {}
        for spec in self.payloads:
            out[spec.name] = (at, at + spec.nbytes)
            at += spec.nbytes
        return out

    def expected_nbytes(self, manifest: Manifest) -> int:
        """Size of the payload artefact that this header describes."""
        sides = sum(p.nbytes for p in self.payloads)
        if self.kind == "init":
            return manifest.nbytes + sides
        spans = self.block_spans(manifest)
        return (spans[-1][1] if spans else 0) + sides

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """The header of some received bytes.

        Raises:
            ManifestInvalid: Too large, not canonical, or a key is missing, unknown or out of range.
        """
        if len(data) > MAX_HEADER_BYTES:
            raise ManifestInvalid(f"header of {len(data)} bytes exceeds {MAX_HEADER_BYTES}")
        try:
            header = cls.model_validate_json(data)
        except ValidationError as error:
            raise ManifestInvalid(f"header: {first_problem(error)}") from None
        if header.encode() != data:
            raise ManifestInvalid("header: not in canonical form")
        if len(set(header.payload_names)) != len(header.payloads):
            raise ManifestInvalid("header: a side payload's name stands twice")
        return header

    @property
    def digest(self) -> str:
        """The name of the contribution."""
        return digest(self.encode())
