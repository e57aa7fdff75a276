"""A contribution on its way in: checked, spooled, synced, counted, in that order.

Nothing is believed. The header must be the certificate's own, answer a plan of this site, come from
a base that the plan accepts, and describe exactly the bytes that follow; the bytes must have the
announced digests and be finite numbers. Only then is its row committed, on the condition that the
round is open, and only then is it acknowledged.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from orchestrator.doorkeeper import Caller
from orchestrator.finiteness import first_bad, first_model_spans, side_spans, tensor_spans
from orchestrator.heads import Announced, Heads
from orchestrator.ledger import ContributionRow, Ledger, PlanRow
from orchestrator.recorder import Recorder
from orchestrator.store import Store
from orchestrator.turns import turn
from protos.bulk import Chunk
from protos.chunks import ChunkFile
from protos.contribution import ASSESSMENTS, Header
from protos.digest import digest
from protos.errors import (
    ContributionRefused,
    DataCorrupt,
    FarflungError,
    InvalidInput,
    ManifestInvalid,
    Unavailable,
)
from protos.faults import reach
from protos.manifest import Index, Manifest
from protos.v1 import common_pb2, site_pb2

log = logging.getLogger(__name__)

PAYLOAD, INDEX, HEADER = "payload", "head.index", "head.header"
TURN = "turn"
"""Locked by the stream that writes; in it stands which process was the last to do so."""

VERDICTS = {
    "counted": (common_pb2.Answer.COUNTED, ""),
    "late": (common_pb2.Answer.LATE, "RoundClosed"),
    "refused": (common_pb2.Answer.REFUSED, "ContributionRefused"),
}
"""What an acceptance is on the wire, and the error that goes with it."""

TURN_S = 30.0
"""How long a stream waits for an older one of the same contribution to end."""

STATUS_S = 5.0
"""The same, for whoever only asks what is missing."""

BlockCheck = Callable[[PlanRow, Header, Path, Path], tuple[float | None, str]]
"""Plan, header, header's file, payload's file -> norm and first bad tensor; for wire codecs."""


class Intake:
    """Receives contributions; several processes may use one spool.

    Args:
        ledger: Knows the plans.
        store: Where their bytes go.
        spool: Folder for what is arriving; on the store's file system.
        recorder: Counts them.
        check_blocks: Decodes an encoded contribution and checks it.
    """

    def __init__(
        self,
        ledger: Ledger,
        store: Store,
        spool: Path,
        recorder: Recorder,
        check_blocks: BlockCheck,
    ) -> None:
        self._ledger, self._store, self._spool = ledger, store, spool
        self._recorder, self._check_blocks = recorder, check_blocks
        self._heads = Heads(ledger, store)
        self._open: dict[str, ChunkFile] = {}  # what this process writes, by contribution
        self._name = os.urandom(8)

    def announce(self, caller: Caller, head: site_pb2.ContributionHead) -> Announced:
        """Check everything that can be checked before a byte of the payload moves; see `Heads`."""
        return self._heads.announce(caller, head)

    # -- bytes --------------------------------------------------------------------------------------

    def _site_folder(self, site: str) -> Path:
        return self._spool / re.sub(r"[^A-Za-z0-9._-]", "_", site)

    def _folder(self, site: str, contribution: str) -> Path:
        return self._site_folder(site) / contribution

    @contextmanager
    def receiving(self, announced: Announced) -> Iterator[ChunkFile]:
        """The file that a contribution is received into; goes on where it was.

        One stream at a time: a site that connected again may be sending while its older stream is
        not known to be broken, or has just been taken as complete. What is refused in the block
        for good leaves nothing behind.

        Raises:
            Unavailable: The older stream, of whichever process, does not end.
        """
        site, contribution = announced.header.site, announced.digest
        folder = self._folder(site, contribution)
        with self._turn(folder, TURN_S) as mark:
            try:
                if not (folder / HEADER).exists():
                    # Not synced: without them a restart finds an unknown folder, and the site sends
                    # again.
                    (folder / INDEX).write_bytes(announced.index.encoded)
                    reach("spool.index.written")
                    (folder / HEADER).write_bytes(announced.encoded)
                    reach("spool.header.written")
                with self._part(folder, announced.index, mark) as file:
                    self._open[contribution] = file
                    yield file
            except (ContributionRefused, ManifestInvalid):
                self.forget(site, contribution)
                raise
            finally:
                self._open.pop(contribution, None)

    @contextmanager
    def _turn(self, folder: Path, wait_s: float) -> Iterator[int]:
        """Have a contribution's folder to oneself, in this process and among all of them."""
        with turn(folder / TURN, wait_s) as mark:
            if mark is None:
                site = folder.parent.name
                raise Unavailable(
                    f"site {site}: another stream sends this contribution; try again", site=site
                )
            yield mark

    def missing(self, caller: Caller, plan_id: str) -> list[tuple[int, int]] | None:
        """Chunks that are missing of the caller's contribution to a plan; None: never heard of it.

        Raises:
            Unavailable: Another process receives it just now.
        """
        for folder in self._site_folder(caller.identity.name).glob("*/"):
            try:
                header = Header.decode((folder / HEADER).read_bytes())
                index = Index.decode((folder / INDEX).read_bytes())
            except (FarflungError, OSError):
                continue
            if header.plan_id == plan_id:
                return self._missing(folder, index)
        return None

    def _missing(self, folder: Path, index: Index) -> list[tuple[int, int]] | None:
        older = self._open.get(folder.name)
        if older is not None:  # a stream of this process, which may still be receiving
            return older.missing()
        with self._turn(folder, STATUS_S) as mark:
            if not (folder / HEADER).exists():  # it was answered meanwhile
                _remove(folder)
                return None
            with self._part(folder, index, mark) as file:
                return file.missing()

    def _part(self, folder: Path, index: Index, mark: int) -> ChunkFile:
        """The file; what another process wrote, an earlier daemon perhaps, is verified first."""
        ours = os.pread(mark, len(self._name), 0) == self._name
        file = ChunkFile(folder / PAYLOAD, index, self._store.spares, verify=not ours)
        os.pwrite(mark, self._name, 0)
        reach("spool.marked")
        return file

    def receive(self, file: ChunkFile, chunks: Iterator[Chunk], site: str) -> int:
        """Write chunks as they come; gives how many bytes came.

        Raises:
            ContributionRefused: A chunk is out of range.
            InvalidInput: One does not have its digest; what came before it stays.
        """
        received = 0
        for chunk in chunks:
            try:
                file.write(chunk.number, chunk.data)
                reach("spool.chunk.written")
            except DataCorrupt as error:
                raise InvalidInput(
                    f"site {site}: {error.message}; send it again", site=site
                ) from None
            except FarflungError as error:
                raise ContributionRefused(f"site {site}: {error.message}", site=site) from None
            received += len(chunk.data)
        return received

    # -- end ------------------------------------------------------------------------------------------

    def complete(self, announced: Announced, file: ChunkFile, caller: Caller) -> common_pb2.Answer:
        """Check a complete payload, store it, count it, and give the final answer.

        Raises:
            ContributionRefused: A tensor holds NaN or infinity; names it.
        """
        file.finish()
        reach("spool.finished")
        with file.path.open("rb", buffering=0) as payload:
            norm = self._examine(announced, payload)
        reach("spool.examined")
        self._store.adopt(announced.index, file.path)
        reach("spool.adopted")
        answer = self._count(announced, norm, caller)
        reach("spool.counted")
        self.forget(announced.header.site, announced.digest)
        reach("spool.forgotten")
        return answer

    def take(self, announced: Announced, data: bytes, caller: Caller) -> common_pb2.Answer:
        """The same for a payload that is here as a whole: nothing of it needs to be resumed.

        Raises:
            ContributionRefused: A tensor holds NaN or infinity; names it.
            InvalidInput: The bytes are not those that were announced.
        """
        index, site = announced.index, announced.header.site
        if len(data) != index.nbytes or any(
            digest(data[slice(*index.span(number))]) != name
            for number, name in enumerate(index.chunks)
        ):
            raise InvalidInput(
                f"site {site}: its payload has other digests; send it again", site=site
            )
        path = self._store.scratch(f"{site}-{announced.digest[:12]}")
        try:
            path.write_bytes(data)
            reach("message.written")
            with path.open("rb", buffering=0) as payload:
                norm = self._examine(announced, payload)
            self._store.adopt(index, path)
            reach("message.adopted")
        finally:
            path.unlink(missing_ok=True)
            reach("message.removed")
        return self._count(announced, norm, caller)

    def _count(self, announced: Announced, norm: float | None, caller: Caller) -> common_pb2.Answer:
        header, plan = announced.header, announced.plan
        acceptance = self._recorder.accept(
            ContributionRow(
                digest=announced.digest,
                plan_id=header.plan_id,
                run=plan.run,
                round=plan.round,
                attempt=plan.attempt,
                kind=plan.kind,
                site=header.site,
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
        verdict, error = VERDICTS[acceptance.verdict]
        return common_pb2.Answer(
            verdict=verdict,
            error=error,
            message=acceptance.reason,
            plan_id=acceptance.plan_id,
            contribution=announced.digest,
        )

    def forget(self, site: str, contribution: str) -> None:
        """Remove what is left in the spool, for whoever has the turn."""
        _remove(self._folder(site, contribution))

    def sweep(self) -> None:
        """Remove what arrived in part for plans that are over; for the daemon's start."""
        for folder in self._spool.glob("*/*"):
            try:
                header = Header.decode((folder / HEADER).read_bytes())
                row = self._ledger.plan(header.plan_id, header.site)
                wanted = row is not None and any(
                    p.work_digest == row.work_digest for p in self._ledger.open_plans(header.site)
                )
            except (FarflungError, OSError):
                wanted = False
            if not wanted:
                shutil.rmtree(folder, ignore_errors=True)
                reach("spool.swept")

    def _examine(self, announced: Announced, payload: FileIO) -> float | None:
        """The norm of the update, where there is one."""
        norm, bad = self._look_at(announced, payload)
        if bad:
            site = announced.header.site
            raise ContributionRefused(
                f"site {site}, tensor {bad}: it holds NaN or infinity; the contribution is not used",
                site=site,
                tensor=bad,
            )
        return norm

    def _look_at(self, announced: Announced, payload: FileIO) -> tuple[float | None, str]:
        plan, header = announced.plan, announced.header
        if plan.kind in ASSESSMENTS:
            return None, first_bad(payload, side_spans(header, Manifest(())))[1]
        if plan.kind == "init":
            spans = first_model_spans(header, Path(payload.name), announced.index.nbytes)
            return None, first_bad(payload, spans)[1]
        covered = self._heads.covered(plan)
        side = first_bad(payload, side_spans(header, covered))[1]
        if header.codec:
            norm, bad = self._check_coded(announced, Path(payload.name))
            return norm, bad or side
        spans = tensor_spans(header, covered)
        square, bad = first_bad(payload, spans)
        return (math.sqrt(square) if not bad else None), bad or side

    def _check_coded(self, announced: Announced, payload: Path) -> tuple[float | None, str]:
        header = payload.with_name(f"{payload.name}.header")
        try:
            header.write_bytes(announced.encoded)
            reach("spool.decoding")
            return self._check_blocks(announced.row, announced.header, header, payload)
        finally:
            header.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    """Remove a contribution's folder, the lock last: who waits for it begins anew."""
    for name in (*(p.name for p in folder.glob("*") if p.name != TURN), TURN):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # somebody who waited has put a file there
        folder.rmdir()
