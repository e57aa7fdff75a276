"""Writes what a site contributes, the payload's bytes and the next state, and says what it is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from torch import Tensor

from protos.chunks import IndexWriter
from protos.contribution import Header, PayloadSpec
from protos.digest import Bytes
from protos.errors import ManifestInvalid
from protos.faults import reach
from protos.manifest import Index, Manifest
from protos.plan import Plan
from protos.spares import Spares
from protos.tensors import dtype_name, view_bytes
from site_agent.trainer.site_state import SiteState
from site_agent.trainer.update import Differences
from strategies.context import SidePayload, Update

PAYLOAD = "payload"


@dataclass
class Blocks:
    """The encoded part of a payload: its bytes, and the header's block table.

    Attributes:
        parts: Bytes in order.
        codec: Name of the wire codec; empty for raw.
        sizes: Bytes of each tile; empty for raw, where they follow from the manifest.
        nbytes: Bytes in all, as far as they are known before they are written.
    """

    parts: Iterable[Bytes] = ()
    codec: str = ""
    sizes: tuple[int, ...] = ()
    nbytes: int = 0


def blocks_of(site: str, covered: Manifest, update: Update, codec: str) -> Blocks:
    """The tiles of an update in the manifest's order, without padding.

    Raises:
        ManifestInvalid: A strategy gave a tensor back in another shape or dtype, dropped one, or
            encoded another number of tiles; names site and tensor.
    """
    extra = sorted(set(update.tensors) - set(covered.positions))
    if extra:
        raise _wrong(site, extra[0], "is not among the tensors that the plan covers")
    sizes: list[int] = []
    parts: list[Iterable[Bytes]] = []
    tiles: dict[str, list[int]] = {}
    for tile in covered.tiles:
        tiles.setdefault(tile.spec.name, []).append(tile.wire_nbytes)
    encoded = update.blocks if update.blocks is not None else {}
    for spec in covered:
        raw = tiles.get(spec.name, [])
        if codec and spec.kind == "parameter":
            blocks = encoded.get(spec.name, [])
            if len(blocks) != len(raw):
                raise _wrong(site, spec.name, f"has {len(raw)} tiles, but {len(blocks)} blocks")
            sizes += [len(b) for b in blocks]
            parts.append(blocks)
            continue
        if spec.name not in update.tensors:
            raise _wrong(site, spec.name, "is missing in the update")
        if isinstance(update.tensors, Differences) and update.tensors.untouched(spec.name):
            sizes += raw
            parts.append(update.tensors.written(spec))
            continue
        tensor = update.tensors[spec.name]
        if tuple(tensor.shape) != spec.shape or dtype_name(tensor) != spec.wire_dtype:
            raise _wrong(
                site,
                spec.name,
                f"is {dtype_name(tensor)} {list(tensor.shape)} in the update where "
                f"{spec.wire_dtype} {list(spec.shape)} belongs",
            )
        sizes += raw
        parts.append([view_bytes(tensor)])
    return Blocks(chain.from_iterable(parts), codec, tuple(sizes) if codec else (), sum(sizes))


def _wrong(site: str, tensor: str, what: str) -> ManifestInvalid:
    return ManifestInvalid(f"site {site}: tensor {tensor} {what}", site=site, tensor=tensor)


@dataclass
class Contribution:
    """All that a contribution consists of, before it is written.

    Attributes:
        plan: What it answers.
        manifest: Digest of the manifest of the blocks.
        blocks: Encoded tensors.
        payloads: Side payloads by "strategy/name".
        examples: See `Header`.
        steps: See `Header`.
        epochs: See `Header`.
        partial: See `Header`.
        metrics: See `Header`.
        seconds: See `Header`.
        task_digest: See `Header`.
        packages: See `Header`.
        state: The site's next state; None where the plan changes none.
    """

    plan: Plan
    manifest: str
    blocks: Blocks = field(default_factory=Blocks)
    payloads: Mapping[str, SidePayload] = field(default_factory=dict)
    examples: int = 0
    steps: int = 0
    epochs: float = 0.0
    partial: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    task_digest: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    state: SiteState | None = None
    _specs: tuple[PayloadSpec, ...] = field(default=(), init=False)

    def write(self, folder: Path, spares: Spares | None = None) -> Index:
        """Make a new folder with payload and next state; gives the payload's index. The link syncs it.

        Args:
            folder: Must not exist.
            spares: Files that may be written over.
        """
        folder.mkdir(mode=0o700)
        reach("payload.folder.made")
        self._specs, tensors = self._side_payloads()
        writer = IndexWriter(folder / PAYLOAD, spares, self.blocks.nbytes)
        try:
            for part in self.blocks.parts:
                writer.write(part)
            for tensor in tensors:
                writer.write(view_bytes(tensor))
            index = writer.finish(self.manifest)
            reach("payload.written")
        except BaseException:
            writer.abort()
            raise
        if self.state is not None:
            plan = self.plan
            about = {"run": plan.run, "round": str(plan.round), "site": plan.site}
            self.state.write(folder, about)
            reach("payload.state.written")
        return index

    def header(self, index: Index) -> Header:
        """The header of what was written: a draft, to which the link applies the site's policy."""
        return Header(
            plan_id=self.plan.id,
            work_digest=self.plan.work_digest,
            site=self.plan.site,
            kind=self.plan.kind,
            base=self.plan.base,
            manifest=self.manifest,
            index=index.digest,
            codec=self.blocks.codec,
            blocks=self.blocks.sizes,
            payloads=self._specs,
            examples=self.examples,
            steps=self.steps,
            epochs=self.epochs,
            partial=self.partial,
            metrics=self.metrics,
            seconds=self.seconds,
            task_digest=self.task_digest,
            packages=self.packages,
        )

    def _side_payloads(self) -> tuple[tuple[PayloadSpec, ...], list[Tensor]]:
        specs, tensors = [], []
        for name, side in self.payloads.items():
            tensor = side.tensor.detach().cpu()
            specs.append(
                PayloadSpec(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=dtype_name(tensor),
                    merge=side.merge,
                )
            )
            tensors.append(tensor)
        return tuple(specs), tensors
