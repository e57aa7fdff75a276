"""A contribution on its way in: checked, spooled, synced, counted, in that order.

Nothing is believed. The header must be the certificate's own, answer a plan of this site, come from
a base that the plan accepts, and describe exactly the bytes that follow; the bytes must have the
announced digests and be finite numbers. Only then is its row committed, on the condition that the
round is open, and only then is it acknowledged.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orchestrator.doorkeeper import Caller
from orchestrator.ledger import ContributionRow, Ledger, PlanRow
from orchestrator.store import Store
from protos.chunks import ChunkFile, write_durably
from protos.contribution import Header
from protos.errors import ContributionRefused, DataCorrupt, FarflungError, NotFound
from protos.identity import verify_header
from protos.manifest import MAX_BYTES, Index, Manifest
from protos.plan import Plan
from protos.v1 import common_pb2, site_pb2

log = logging.getLogger(__name__)

MAX_SIDE_BYTES = 256 << 20
"""Side payloads of one contribution, together (init and assess carry everything in them)."""

BLOCK_BYTES = 1 << 20

BlockCheck = Callable[[PlanRow, Header, Path, Path], tuple[float | None, str]]
"""Plan, header, header's file, payload's file -> norm and first bad tensor; for wire codecs."""


@dataclass
class Announced:
    """A head that was checked.

    Attributes:
        header: The header.
        encoded: Its bytes as carried.
        signature: Over them.
        index: Of the payload.
        plan: The plan that it answers.
        row: The plan's row.
    """

    header: Header
    encoded: bytes
    signature: bytes
    index: Index
    plan: Plan
    row: PlanRow


class Intake:
    """Receives contributions.

    Args:
        ledger: Where they are counted.
        store: Where their bytes go.
        spool: Folder for what is arriving; on the store's file system.
        check_blocks: Decodes an encoded contribution and checks it.
    """

    def __init__(self, ledger: Ledger, store: Store, spool: Path, check_blocks: BlockCheck) -> None:
        self._ledger, self._store, self._spool = ledger, store, spool
        self._check_blocks = check_blocks

    # -- head -------------------------------------------------------------------------------------

    def announce(self, caller: Caller, head: site_pb2.ContributionHead) -> Announced:
        """Check everything that can be checked before a byte of the payload moves.

        Raises:
            ContributionRefused: Something in the head does not fit; says what and for which site.
            ManifestInvalid: The header or the index breaks a bound.
            NotFound: The site has no such plan.
        """
        site = caller.identity.name
        header = Header.decode(head.header)
        if header.site != site:
            raise ContributionRefused(
                f"site {site}: the header speaks for {header.site}", site=site, key="site"
            )
        if not verify_header(caller.certificate, head.signature, head.header, header.plan_id, site):
            raise ContributionRefused(
                f"site {site}: the signature does not hold for this header and plan", site=site
            )
        row = self._ledger.plan(header.plan_id, site)
        if row is None:
            raise NotFound(f"site {site}: no plan {header.plan_id} was given to it", site=site)
        plan = Plan.decode(row.plan)
        index = Index.decode(head.index)
        self._check_head(site, header, plan, index)
        return Announced(header, head.header, head.signature, index, plan, row)

    def _check_head(self, site: str, header: Header, plan: Plan, index: Index) -> None:
        def refuse(what: str, key: str) -> None:
            raise ContributionRefused(
                f"site {site}, plan {header.plan_id}: {what}", site=site, key=key
            )

        if header.work_digest != plan.work_digest:
            refuse("it answers other work than the plan asks for", "work_digest")
        if header.kind != plan.kind:
            refuse(f"it is a {header.kind} contribution to a {plan.kind} plan", "kind")
        if index.digest != header.index:
            refuse("the index is not the one that the header names", "index")
        if index.manifest != header.manifest:
            refuse("index and header name different manifests", "manifest")
        if plan.kind != "init" and header.base not in (plan.base, *plan.accepts):
            refuse(
                f"it was trained from the base {header.base[:12] or '(none)'}, "
                f"the plan accepts {plan.base[:12]}",
                "base",
            )
        side = sum(p.nbytes for p in header.payloads)
        if side > (MAX_BYTES if plan.kind == "init" else MAX_SIDE_BYTES):
            refuse(f"{side} bytes of side payloads", "payloads")
        if plan.kind == "init":
            if "init/manifest" not in header.payload_names:
                refuse("it carries no manifest", "payloads")
            return
        covered = self.covered(plan)
        if plan.kind == "train" and header.manifest != covered.digest:
            refuse(
                "its tensors are not those of the plan: their names, shapes or dtypes differ",
                "manifest",
            )
        expected = header.expected_nbytes(covered)
        if index.nbytes != expected:
            refuse(
                f"{index.nbytes} bytes are announced where header and manifest make {expected}",
                "nbytes",
            )

    def covered(self, plan: Plan) -> Manifest:
        """The manifest of the tensors that a plan covers."""
        if not plan.manifest:
            return Manifest(())
        return self._store.manifest(plan.manifest).covering(plan.groups)

    # -- bytes --------------------------------------------------------------------------------------

    def _folder(self, site: str, contribution: str) -> Path:
        return self._spool / re.sub(r"[^A-Za-z0-9._-]", "_", site) / contribution

    def open(self, announced: Announced) -> ChunkFile:
        """The file that a contribution is received into; goes on where it was."""
        folder = self._folder(announced.header.site, announced.header.digest)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(folder / "head.index", announced.index.encoded)
        write_durably(folder / "head.header", announced.encoded)
        return ChunkFile(folder / "payload", announced.index)

    def missing(self, caller: Caller, plan_id: str) -> list[tuple[int, int]] | None:
        """Chunks that are missing of the caller's contribution to a plan; None: never heard of it."""
        site = caller.identity.name
        folder = self._spool / re.sub(r"[^A-Za-z0-9._-]", "_", site)
        for child in folder.iterdir() if folder.is_dir() else ():
            try:
                header = Header.decode((child / "head.header").read_bytes())
                index = Index.decode((child / "head.index").read_bytes())
            except (FarflungError, OSError):
                continue
            if header.plan_id == plan_id:
                with ChunkFile(child / "payload", index) as file:
                    return file.missing()
        return None

    def receive(self, file: ChunkFile, chunks: Iterator[common_pb2.Chunk], site: str) -> int:
        """Write chunks as they come; gives how many bytes came.

        Raises:
            ContributionRefused: A chunk is out of range or does not have its digest.
        """
        received = 0
        for chunk in chunks:
            try:
                file.write(chunk.number, chunk.data)
            except (DataCorrupt, FarflungError) as error:
                raise ContributionRefused(f"site {site}: {error.message}", site=site) from None
            received += len(chunk.data)
        return received

    # -- end ------------------------------------------------------------------------------------------

    def complete(self, announced: Announced, file: ChunkFile, caller: Caller) -> common_pb2.Answer:
        """Check a complete payload, store it, count it, and give the final answer.

        Raises:
            ContributionRefused: A tensor holds NaN or infinity; names it.
        """
        header, site = announced.header, announced.header.site
        file.finish()
        folder = file.path.parent
        norm, bad = self._examine(announced, folder)
        if bad:
            self.forget(site, header.digest)
            raise ContributionRefused(
                f"site {site}, tensor {bad}: it holds NaN or infinity; the contribution is not used",
                site=site,
                tensor=bad,
            )
        self._store.adopt(announced.index, file.path)
        acceptance = self._ledger.accept(
            ContributionRow(
                digest=header.digest,
                plan_id=header.plan_id,
                run=announced.plan.run,
                round=announced.plan.round,
                attempt=announced.plan.attempt,
                kind=announced.plan.kind,
                site=site,
                work_digest=header.work_digest,
                header=announced.encoded,
                signature=announced.signature,
                fingerprint=caller.fingerprint,
                index=announced.index.digest,
                manifest=header.manifest,
                nbytes=announced.index.nbytes,
                norm=norm,
                received=time.time(),
            )
        )
        self.forget(site, header.digest)
        verdict = {
            "counted": common_pb2.Answer.COUNTED,
            "late": common_pb2.Answer.LATE,
            "refused": common_pb2.Answer.REFUSED,
        }[acceptance.verdict]
        return common_pb2.Answer(
            verdict=verdict,
            error="" if acceptance.verdict == "counted" else "RoundClosed",
            message=acceptance.reason,
            plan_id=acceptance.plan_id,
            contribution=header.digest,
        )

    def forget(self, site: str, contribution: str) -> None:
        """Remove what is left in the spool."""
        shutil.rmtree(self._folder(site, contribution), ignore_errors=True)

    def _examine(self, announced: Announced, folder: Path) -> tuple[float | None, str]:
        plan, header = announced.plan, announced.header
        payload = folder / "payload"
        if plan.kind in ("assess", "reassess"):
            return None, _first_bad(payload, _side_spans(header, Manifest(())))[1]
        if plan.kind == "init":
            return None, ""  # checked when it is taken apart, see rounds.first
        covered = self.covered(plan)
        side = _first_bad(payload, _side_spans(header, covered))[1]
        if header.codec:
            norm, bad = self._check_blocks(announced.row, header, folder / "head.header", payload)
            return norm, bad or side
        spans = _tensor_spans(header, covered)
        square, bad = _first_bad(payload, spans)
        return (math.sqrt(square) if not bad else None), bad or side


Span = tuple[str, str, int, int, bool]
"""Tensor, dtype, first byte, one past the last, whether it counts for the norm."""


def _tensor_spans(header: Header, covered: Manifest) -> list[Span]:
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


def _side_spans(header: Header, covered: Manifest) -> list[Span]:
    where = header.payload_spans(covered)
    return [
        (p.name, p.dtype, *where[p.name], False)
        for p in header.payloads
        if p.dtype in ("float32", "float64", "float16")
    ]


def _first_bad(path: Path, spans: list[Span]) -> tuple[float, str]:
    """Sum of squares over the spans that count, and the first tensor that is not finite.

    A sum of squares that is finite proves that all are (at a third of a scan's cost); one that is
    not may have overflowed, so the block is then looked at.
    """
    total = 0.0
    with path.open("rb", buffering=0) as file:
        for name, dtype, start, stop, counts in spans:
            file.seek(start)
            left = stop - start
            while left > 0:
                data = file.read(min(BLOCK_BYTES, left))
                if not data:
                    return math.nan, name
                left -= len(data)
                values = np.frombuffer(data, dtype=np.dtype(dtype))
                with np.errstate(over="ignore", invalid="ignore"):
                    square = float(np.dot(values, values))
                if not math.isfinite(square):
                    if not bool(np.isfinite(values).all()):
                        return math.nan, name
                    wide = values.astype(np.float64)
                    square = float(np.dot(wide, wide))
                total += square if counts else 0.0
    return total, ""
