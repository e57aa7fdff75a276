"""Finished contributions and the states that belong to them: one folder each, named by its digest.

A folder comes to be by one rename, so that it is either complete, with its next state, or not there;
a finished contribution is never trained twice. Only a final answer empties it of its payload. Its
state stays for the plans that name it as the one to start from::

    payload              what is sent
    state.safetensors    the site's next state, if there is anything to remember
    waiting              header, signature and index as they are sent; with the answer the file's
                         name becomes the verdict: counted, late or refused
"""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import DecodeError

from protos.chunks import sync_folder, sync_tree
from protos.contribution import Header
from protos.digest import digest, is_digest
from protos.errors import DataCorrupt, FarflungError
from protos.faults import reach
from protos.identity import Key, sign_header
from protos.manifest import Index
from protos.plan import Plan, round_of
from protos.spares import LEAST_BYTES
from protos.v1 import site_pb2
from site_agent.home import Home

Verdict = Literal["counted", "late", "refused"]

PAYLOAD, WAITING = "payload", "waiting"
VERDICTS: tuple[Verdict, ...] = ("counted", "late", "refused")


@dataclass
class Entry:
    """One finished contribution.

    Attributes:
        folder: Where it is.
        header: Its header.
        encoded: The header's bytes, as signed.
        signature: Over them.
        index: Of its payload.
        verdict: The final answer; None while there is none.
        plans: Ids of the plans that it answers: the header's, and later attempts of the same work.
        fresh: It was never offered, so that the orchestrator can't have anything of it.
    """

    folder: Path
    header: Header
    encoded: bytes
    signature: bytes
    index: Index
    verdict: Verdict | None = None
    plans: list[str] = field(default_factory=list)
    fresh: bool = False

    @property
    def digest(self) -> str:
        """Its name."""
        return self.folder.name

    @property
    def run(self) -> str:
        """Id of its run."""
        return self.header.plan_id.split("/", 1)[0]

    @property
    def payload(self) -> Path:
        """The file that is sent."""
        return self.folder / PAYLOAD

    @property
    def stateful(self) -> bool:
        """Whether a site's state belongs to it, be there anything in it or not."""
        return self.header.kind == "train"

    def facts(self) -> dict[str, Any]:
        """The same for the command line."""
        plan = self.header.plan_id
        return {"contribution": self.digest, "plan": plan, "nbytes": self.index.nbytes}


class Outbox:
    """All finished contributions of a site.

    Args:
        home: The site's folder.
        keep: How many answered ones keep their state, for each run and verdict.
    """

    def __init__(self, home: Home, keep: int = 5) -> None:
        self._home, self._keep = home, keep
        self._spares = home.spares()
        self._lock = threading.RLock()
        self._entries: dict[str, Entry] = {}
        self._needed: dict[str, str] = {}
        self.damaged: list[str] = []
        self._dropped = 0
        for leftover in home.work.iterdir():
            _remove(leftover)
            reach("outbox.leftover.removed")
        for folder in sorted(home.contributions.iterdir(), key=lambda f: f.stat().st_mtime):
            try:
                entry = _read(folder)
            except (FarflungError, OSError, ValueError):
                self.damaged.append(folder.name)
                continue
            self._entries[entry.digest] = entry

    # -- in --------------------------------------------------------------------------------------

    def admit(self, made: Path, header: Header, index: Index, key: Key) -> Entry:
        """Sign what the trainer made and take it in, durably, by one rename.

        Args:
            made: Folder with the payload and perhaps a state, on the outbox's file system.
            header: As it is to be signed.
            index: Of the payload.
            key: The site's.

        Raises:
            DataCorrupt: The index is not the header's, or the payload has another size.
        """
        if index.digest != header.index or (made / PAYLOAD).stat().st_size != index.nbytes:
            raise DataCorrupt("the trainer's payload is not the one that its header describes")
        encoded = header.encode()
        signature = sign_header(key, encoded, header.plan_id, header.site)
        head = site_pb2.ContributionHead(header=encoded, signature=signature, index=index.encoded)
        reach("outbox.signed")
        (made / WAITING).write_bytes(head.SerializeToString())
        reach("outbox.head.written")
        sync_tree(made)
        reach("outbox.synced")
        name = digest(encoded)
        with self._lock:
            target = self._home.contributions / name
            if target.exists():  # the same work, to the bit, was finished before
                _remove(target)
            made.rename(target)
            reach("outbox.renamed")
            # Where it came from needs no sync: what a power cut leaves there is removed at the start.
            sync_folder(target.parent)
            reach("outbox.named")
            plans = [header.plan_id]
            entry = Entry(target, header, encoded, signature, index, None, plans, fresh=True)
            self._entries[name] = entry
            reach("outbox.admitted")
            return entry

    # -- look ------------------------------------------------------------------------------------

    def waiting(self) -> list[Entry]:
        """Contributions without a final answer, oldest first."""
        with self._lock:
            return [e for e in self._entries.values() if e.verdict is None]

    def of_work(self, work_digest: str) -> Entry | None:
        """The waiting contribution that did this work."""
        return next((e for e in self.waiting() if e.header.work_digest == work_digest), None)

    def for_earlier(self, plan: Plan) -> Entry | None:
        """The waiting contribution to an earlier round that counts for a plan."""
        return next(
            (
                e
                for e in self.waiting()
                if e.run == plan.run
                and e.header.kind == plan.kind == "train"
                and round_of(e.header.plan_id) < plan.round
                and plan.takes(e.header.base)
            ),
            None,
        )

    def find(self, contribution: str, plan_id: str) -> Entry | None:
        """The waiting contribution of that digest, else the one that answers that plan."""
        with self._lock:
            entry = self._entries.get(contribution)
            if entry is None and not contribution:
                entry = next((e for e in self.waiting() if plan_id in e.plans), None)
            return entry if entry is not None and entry.verdict is None else None

    def state(self, contribution: str, run: str) -> Path | None:
        """The folder that holds the state stored under a contribution's digest; None if it is lost.

        It is kept as long as plans name it.
        """
        with self._lock:
            self._needed[run] = contribution
            entry = self._entries.get(contribution)
            return entry.folder if entry is not None and entry.stateful else None

    # -- out -------------------------------------------------------------------------------------

    def answer(self, entry: Entry, verdict: Verdict) -> None:
        """The final answer: the payload goes, header and state stay.

        It is synced only before the payload's bytes are written over. Until then a power cut may take
        it back, and the contribution is offered, and answered, once more.
        """
        with self._lock:
            if entry.verdict is not None:
                return
            entry.verdict = verdict
            reach("outbox.answered")
            if not entry.stateful:
                self._drop(entry, recycle=True)
                return
            (entry.folder / WAITING).rename(entry.folder / verdict)
            reach("outbox.verdict.renamed")
            if entry.index.nbytes >= LEAST_BYTES:
                sync_folder(entry.folder)
                reach("outbox.verdict.synced")
            self._spares.give(entry.payload)
            reach("outbox.payload.given")
            self._prune(entry.run)
            reach("outbox.pruned")

    def discard(self, entry: Entry) -> None:
        """Remove a contribution that can't be sent (its payload is damaged)."""
        with self._lock:
            self._drop(entry)

    def forget_run(self, run: str) -> int:
        """Remove everything of a run; gives how many contributions that were."""
        with self._lock:
            gone = [e for e in self._entries.values() if e.run == run]
            for entry in gone:
                self._drop(entry)
            self._needed.pop(run, None)
            self._spares.clear()
            return len(gone)

    def _prune(self, run: str) -> None:
        """Keep the newest few of each verdict: late ones must not push out the last counted one."""
        for verdict in VERDICTS:
            done = [e for e in self._entries.values() if e.run == run and e.verdict == verdict]
            for entry in done[: -self._keep]:
                if entry.digest != self._needed.get(run):
                    self._drop(entry)

    def _drop(self, entry: Entry, recycle: bool = False) -> None:
        self._entries.pop(entry.digest, None)
        self._dropped += 1
        grave = self._home.work / f"gone-{self._dropped}"
        entry.folder.rename(grave)
        reach("outbox.buried")
        if recycle:
            self._spares.give(grave / PAYLOAD)
        _remove(grave)
        reach("outbox.removed")


def _read(folder: Path) -> Entry:
    names = {path.name for path in folder.iterdir()}
    verdict = next((v for v in VERDICTS if v in names), None)
    try:
        head = site_pb2.ContributionHead.FromString((folder / (verdict or WAITING)).read_bytes())
    except DecodeError:
        raise DataCorrupt(f"{folder.name[:16]}: the header can't be read") from None
    if not is_digest(folder.name) or digest(head.header) != folder.name:
        raise DataCorrupt(f"{folder.name[:16]}: the header is not the one of its name")
    header, index = Header.decode(head.header), Index.decode(head.index)
    if verdict is None and PAYLOAD not in names:
        # Only an answer takes the payload away; a power cut took back which one it was.
        verdict = "counted"
    entry = Entry(folder, header, head.header, head.signature, index, verdict, [header.plan_id])
    if verdict is None and entry.payload.stat().st_size != index.nbytes:
        raise DataCorrupt(f"{folder.name[:16]}: the payload is cut")
    return entry


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
