"""Fault points: named places of both ends where a test may have a process killed, stopped or failed.

A call of `reach` stands behind every write, sync, rename, message and change of state. It does
nothing, in some 50 ns, unless the process was started with the variable `FOLDER`. With it, a process
follows what lies in that folder:

    plan     JSON, a `Fault`: what to do at which point. It is taken up whenever it appears, renamed
             to ``done``, and only then done
    trace    a line for every point that was reached: the kind of process, the point, and the
             seconds of `time.monotonic`, one clock for all processes of a machine

Whoever puts a plan there renames it into place.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

FOLDER = "FARFLUNG_FAULTS"
"""The variable that names the folder."""

PLAN, DONE, TRACE = "plan", "done", "trace"


@dataclass(frozen=True)
class Fault:
    """What is to go wrong.

    Attributes:
        at: Name of the point.
        hit: At which time that it is reached, counted from when a process sees the plan.
        do: kill (SIGKILL of the process itself), stop (SIGSTOP), delay, or raise (an `OSError`).
        process: Which kind of process: daemon, gateway, link or trainer; empty for whichever comes first.
        seconds: How long to delay.
        error: Name of the error to raise.
    """

    at: str
    hit: int = 1
    do: Literal["kill", "stop", "delay", "raise"] = "kill"
    process: str = ""
    seconds: float = 0.0
    error: str = "ENOSPC"

    def put(self, folder: Path) -> None:
        """Have the processes that use a folder follow it.

        Raises:
            ValueError: There is no point of that name.
        """
        if self.at not in POINTS:
            raise ValueError(f"there is no fault point {self.at}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DONE).unlink(missing_ok=True)
        draft = folder / f".{PLAN}"
        draft.write_text(json.dumps(asdict(self)))
        draft.rename(folder / PLAN)


class _Following:
    """A process that follows a folder."""

    def __init__(self, folder: Path, process: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._process = folder, process
        self._plan, self._done = folder / PLAN, folder / DONE
        self._trace = os.open(
            folder / TRACE, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._fault: Fault | None = None
        self._hits = 0

    def reached(self, name: str) -> None:
        if name not in POINTS:
            raise ValueError(f"the fault point {name} is not in the list")
        with self._lock:
            os.write(self._trace, f"{self._process} {name} {time.monotonic():.6f}\n".encode())
            fault = self._current()
            if fault is None or fault.at != name or fault.process not in ("", self._process):
                return
            self._hits += 1
            if self._hits < fault.hit:
                return
            try:
                self._plan.rename(self._done)
            except FileNotFoundError:  # another process of this folder was faster
                return
        _act(fault)

    def _current(self) -> Fault | None:
        try:
            found = self._plan.stat()
            stamp = (found.st_ino, found.st_mtime_ns)
            if stamp != self._seen:
                self._fault, self._hits = Fault(**json.loads(self._plan.read_text())), 0
                self._seen = stamp
        except FileNotFoundError:
            return None
        return self._fault


def _act(fault: Fault) -> None:
    match fault.do:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "delay":
            time.sleep(fault.seconds)
        case "raise":
            number = getattr(errno, fault.error)
            raise OSError(number, os.strerror(number))


_following: list[_Following] = []
"""One, or none: the rule."""


def enter(process: str) -> None:
    """The begin of a process of ours: follow the folder that `FOLDER` names, if it names one."""
    folder = os.environ.get(FOLDER)
    _following[:] = [_Following(Path(folder), process)] if folder else []


def reach(name: str) -> None:
    """A fault point."""
    for following in _following:
        following.reached(name)


_LIST = """
protos/chunks.py
    folder.opened folder.synced tree.file.synced document.writing document.written
    document.synced document.renamed document.named artefact.begun artefact.chunk.written
    artefact.flushed part.taken_up part.old_record.removed part.made part.chunk.written
    part.synced part.recorded part.whole.synced part.renamed part.forgotten part.discarded
protos/spares.py
    spare.refused spare.given spare.taken
orchestrator/daemon.py
    daemon.ledger.opened daemon.deadlines.moved daemon.store.cleaned daemon.compute.started
    daemon.sites.served daemon.runner.started
orchestrator/exchange.py
    gather.counted gather.failed gather.begun gather.known gather.offered gather.decided
    gather.heard gather.finishing gather.cancelled
orchestrator/intake.py
    spool.index.written spool.header.written spool.marked spool.chunk.written spool.finished
    spool.examined spool.adopted spool.counted spool.forgotten message.written message.adopted
    message.removed spool.swept spool.decoding
orchestrator/ledger/contributions.py
    carry.counted accept.late accept.inserted accept.answered accept.chained
orchestrator/ledger/database.py
    ledger.begun ledger.written ledger.committed
orchestrator/ledger/events.py
    events.written
orchestrator/ledger/exchanges.py
    exchange.opened exchange.begun exchange.begun.again exchange.ended
orchestrator/ledger/plans.py
    answer.set plans.inserted
orchestrator/ledger/rounds.py
    round.inserted round.chained round.stepped
orchestrator/reception.py
    receive.settled receive.whole receive.announced status.asked receive.refused
orchestrator/recorder.py
    record.accepted record.told record.refused
orchestrator/rounds/assess.py
    assess.scored assess.rated assess.opened assess.gathered assess.closed
orchestrator/rounds/commit.py
    round.committing
orchestrator/rounds/engine.py
    compute.asking compute.isolating scratch.made scratch.removed parts.manifest.put
orchestrator/rounds/first.py
    first.planned first.closed first.made first.adopted
orchestrator/rounds/gather.py
    round.closing round.closed
orchestrator/rounds/holdout.py
    assess.holdout
orchestrator/rounds/plan.py
    round.drawn round.planned round.carried
orchestrator/rounds/reduce.py
    reduce.begun reduce.done reduce.adopted reduce.state.adopted reduce.merged
orchestrator/rounds/refine.py
    refine.begun refine.done refine.adopted refine.files.stored
orchestrator/runs.py
    run.taken run.round.begun run.finished run.tidied run.retired
orchestrator/sessions.py
    session.saying session.attached session.detached
orchestrator/site_service.py
    enrol.issued enrol.recorded attach.heard attach.welcomed attach.offered stream.heard
    stream.answering stream.answered outcome.recorded serve.asked serve.head.sent
    serve.chunk.sent contribute.heard
orchestrator/store/folder.py
    blob.synced blob.renamed blob.unlinked blob.removed blob.folder.made
orchestrator/store/space.py
    room.reserved
orchestrator/store/store.py
    adopt.begun adopt.renewed adopt.moved adopt.indexed store.cleaned retire.unnamed
    retire.recycled retire.removed store.put
site_agent/home.py
    home.locked
site_agent/link/agenda.py
    plan.heard plan.known plan.based plan.accepted plan.finishing plan.cancelled plan.failed
site_agent/link/doorbell.py
    doorbell.bound
site_agent/link/enrolment.py
    join.begun join.key.kept join.stored join.done
site_agent/link/fetcher.py
    fetch.unpacked fetch.asking fetch.chunk.written fetch.head.heard fetch.index.written
    fetch.manifest.written fetch.unnamed fetch.pruned
site_agent/link/keys.py
    keys.written keys.replaced
site_agent/link/outbox.py
    outbox.leftover.removed outbox.signed outbox.head.written outbox.synced outbox.renamed
    outbox.named outbox.admitted outbox.answered outbox.verdict.renamed outbox.verdict.synced
    outbox.payload.given outbox.pruned outbox.buried outbox.removed
site_agent/link/sender.py
    contribute.saying contribute.said contribute.status.heard contribute.head.sent
    contribute.chunk.sent contribute.sent contribute.answered contribute.verdict.kept
    contribute.settled
site_agent/link/outgoing.py
    control.saying control.progress control.beating
site_agent/link/stream.py
    control.dialled control.heard control.ended control.attached
site_agent/link/trainer_process.py
    trainer.spawned trainer.told
site_agent/link/worker.py
    job.begun job.prepared job.fetched job.reserved job.performing job.ready job.done
    job.admitted job.checkpoint.removed job.trainer.died job.removed
site_agent/trainer/checkpoint.py
    checkpoint.refused checkpoint.written checkpoint.synced checkpoint.renamed checkpoint.saved
site_agent/trainer/exchange.py
    train.adopted train.fitted train.encoded train.begun assess.summed
site_agent/trainer/fitting.py
    train.resumed train.epoch.begun train.stepped train.epoch.ended
site_agent/trainer/payload.py
    payload.folder.made payload.written payload.state.written
site_agent/trainer/server.py
    prepare.heard prepare.task.loaded prepare.loaded prepare.told perform.heard perform.done
    perform.told finish.heard cancel.heard
"""


def _listed() -> dict[str, str]:
    points, module = {}, ""
    for line in _LIST.strip().splitlines():
        if not line.startswith(" "):
            module = line
        else:
            points.update(dict.fromkeys(line.split(), module))
    return points


POINTS: dict[str, str] = _listed()
"""Every point, and the module that it stands in."""
