"""Finished contributions and the states that belong to them: one folder each, named by its digest.

A folder comes to be by one rename, so that it is either complete, with its next state, or not there;
a finished contribution is never trained twice. Only a final answer empties it of its payload. Its
state stays for the plans that name it as the one to start from.
"""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from protos.chunks import sync_folder, sync_tree, write_durably
from protos.contribution import Header
from protos.digest import canonical, digest, is_digest
from protos.errors import DataCorrupt, FarflungError
from protos.identity import Key, sign_header
from protos.manifest import Index
from site_agent.home import Home

Verdict = Literal["counted", "late", "refused"]

PAYLOAD, INDEX, HEADER, SIGNATURE, STATE, ANSWER = (
    "payload", "index.json", "header.json", "signature", "state", "answer.json",
)  # fmt: skip


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
        """Whether a site's state belongs to it."""
        return (self.folder / STATE).is_dir()


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
        for leftover in home.work.iterdir():
            _remove(leftover)
        for folder in sorted(home.contributions.iterdir(), key=lambda f: f.stat().st_mtime):
            try:
                entry = _read(folder)
            except (FarflungError, OSError, ValueError):
                self.damaged.append(folder.name)
                continue
            self._entries[entry.digest] = entry

    # -- in --------------------------------------------------------------------------------------

    def admit(self, made: Path, header: Header, key: Key) -> Entry:
        """Sign what the trainer made and take it in, durably, by one rename.

        Args:
            made: Folder with payload, index and perhaps a state, on the outbox's file system.
            header: As it is to be signed.
            key: The site's.

        Raises:
            DataCorrupt: The index is not the header's, or the payload has another size.
        """
        index = Index.decode((made / INDEX).read_bytes())
        if index.digest != header.index or (made / PAYLOAD).stat().st_size != index.nbytes:
            raise DataCorrupt("the trainer's payload is not the one that its header describes")
        encoded = header.encode()
        signature = sign_header(key, encoded, header.plan_id, header.site)
        (made / HEADER).write_bytes(encoded)
        (made / SIGNATURE).write_bytes(signature)
        sync_tree(made)
        name = digest(encoded)
        with self._lock:
            target = self._home.contributions / name
            if target.exists():  # the same work, to the bit, was finished before
                _remove(target)
            made.rename(target)
            sync_folder(target.parent)
            sync_folder(made.parent)
            plans = [header.plan_id]
            entry = Entry(target, header, encoded, signature, index, None, plans, fresh=True)
            self._entries[name] = entry
            return entry

    # -- look ------------------------------------------------------------------------------------

    def waiting(self) -> list[Entry]:
        """Contributions without a final answer, oldest first."""
        with self._lock:
            return [e for e in self._entries.values() if e.verdict is None]

    def of_work(self, work_digest: str) -> Entry | None:
        """The waiting contribution that did this work."""
        return next((e for e in self.waiting() if e.header.work_digest == work_digest), None)

    def find(self, contribution: str, plan_id: str) -> Entry | None:
        """The waiting contribution of that digest, else the one that answers that plan."""
        with self._lock:
            entry = self._entries.get(contribution)
            if entry is None and not contribution:
                entry = next((e for e in self.waiting() if plan_id in e.plans), None)
            return entry if entry is not None and entry.verdict is None else None

    def state(self, contribution: str, run: str) -> Path | None:
        """The state stored under a contribution's digest; it is kept as long as plans name it."""
        with self._lock:
            self._needed[run] = contribution
            entry = self._entries.get(contribution)
            return entry.folder / STATE if entry is not None and entry.stateful else None

    # -- out -------------------------------------------------------------------------------------

    def answer(self, entry: Entry, verdict: Verdict, message: str) -> None:
        """The final answer: the payload goes, header and state stay."""
        with self._lock:
            if entry.verdict is not None:
                return
            entry.verdict = verdict
            if not entry.stateful:
                self._drop(entry, recycle=True)
                return
            answer = {"verdict": verdict, "message": message, "plans": entry.plans}
            write_durably(entry.folder / ANSWER, canonical(answer), 0o600)
            self._spares.give(entry.payload)
            self._prune(entry.run)

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
        for verdict in ("counted", "late", "refused"):
            done = [e for e in self._entries.values() if e.run == run and e.verdict == verdict]
            for entry in done[: -self._keep]:
                if entry.digest != self._needed.get(run):
                    self._drop(entry)

    def _drop(self, entry: Entry, recycle: bool = False) -> None:
        self._entries.pop(entry.digest, None)
        grave = self._home.work / f"gone-{entry.digest}"
        _remove(grave)
        entry.folder.rename(grave)
        if recycle:
            self._spares.give(grave / PAYLOAD)
        _remove(grave)


def _read(folder: Path) -> Entry:
    encoded = (folder / HEADER).read_bytes()
    if not is_digest(folder.name) or digest(encoded) != folder.name:
        raise DataCorrupt(f"{folder.name[:16]}: the header is not the one of its name")
    header = Header.decode(encoded)
    entry = Entry(
        folder,
        header,
        encoded,
        (folder / SIGNATURE).read_bytes(),
        Index.decode((folder / INDEX).read_bytes()),
        plans=[header.plan_id],
    )
    if (folder / ANSWER).exists():
        entry.verdict = json.loads((folder / ANSWER).read_bytes())["verdict"]
    elif entry.payload.stat().st_size != entry.index.nbytes:
        raise DataCorrupt(f"{folder.name[:16]}: the payload is cut")
    return entry


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
