"""Does the plans, in order: asks for their bases, tells the trainer, takes in what it makes.

One thread and one inbox. Whatever happens (a plan, a line of the trainer, a file that was fetched, a
cancellation) is an item in the inbox, so that nothing here waits for one thing and misses another.
"""

from __future__ import annotations

import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

from protos.contribution import Header
from protos.errors import FarflungError, OutOfSpace, TaskFailed
from protos.faults import reach
from protos.manifest import Index
from protos.plan import Plan
from protos.v1 import site_pb2
from site_agent import pipe
from site_agent.config import SiteConfig
from site_agent.home import Home
from site_agent.link.disclosure import Disclosure
from site_agent.link.fetcher import Fetcher, Want, why_not
from site_agent.link.job import Ears, Job, reserve
from site_agent.link.journal import Journal
from site_agent.link.outbox import Entry, Outbox
from site_agent.link.plans import Assignment, told
from site_agent.link.policy import Policy
from site_agent.link.trainer_process import Died, Heard, TrainerProcess
from site_agent.task_source import TaskSource

CANCEL_GRACE_S = 10.0
"""A trainer that does not stop working on a cancelled plan in this time is ended."""


class Worker:
    """See the module.

    Args:
        site: Name of the site.
        home: Its folder.
        config: ``site.toml``.
        sources: Where each task's code is.
        policy: What the site lets out.
        disclosure: What it says.
        fetcher: Downloads.
        outbox: Where contributions go.
        sign: Takes in what the trainer made: folder, header and index to an entry of the outbox.
        ears: Who hears of it.
        journal: Log.
    """

    def __init__(
        self,
        *,
        site: str,
        home: Home,
        config: SiteConfig,
        sources: Mapping[str, TaskSource],
        policy: Policy,
        disclosure: Disclosure,
        fetcher: Fetcher,
        outbox: Outbox,
        sign: Callable[[Path, Header, Index], Entry],
        ears: Ears,
        journal: Journal,
    ) -> None:
        self._site, self._home, self._config, self._sources = site, home, config, sources
        self._policy, self._disclosure, self._fetcher = policy, disclosure, fetcher
        self._outbox, self._sign, self._ears, self._journal = outbox, sign, ears, journal
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[Assignment] = deque()
        self._trainer: TrainerProcess | None = None
        self._job: Job | None = None
        self._jobs = 0
        self._spares = home.spares()
        self._paused = False

    # -- from other threads ----------------------------------------------------------------------

    def submit(self, assignment: Assignment) -> None:
        """A plan to do when those before it are done."""
        self._inbox.put(lambda: self._waiting.append(assignment))

    def cancel(self, plan_id: str) -> None:
        """A plan is not wanted any more."""
        self._inbox.put(lambda: self._cancel(plan_id))

    def finish(self, plan_id: str) -> None:
        """A plan's training is to end with what is done."""
        self._inbox.put(lambda: self._finish(plan_id))

    def pause(self, paused: bool) -> None:
        """Begin no further plan until told otherwise; the one in work is finished."""
        self._inbox.put(lambda: setattr(self, "_paused", paused))

    def stop(self) -> None:
        """End the thread and the trainer."""
        self._inbox.put(None)

    @property
    def trainer_pid(self) -> int | None:
        """Process id of the trainer, if there is one."""
        trainer = self._trainer
        return trainer.pid if trainer is not None else None

    @property
    def trainer_device(self) -> str:
        """Where the trainer trains, once it said so."""
        trainer = self._trainer
        return trainer.device if trainer is not None else ""

    # -- the thread ------------------------------------------------------------------------------

    def run(self) -> None:
        """Work until stopped. The kernel ends the trainer with this thread."""
        if self._config.trainer.keep_warm and self._sources:
            self._warm_up()
        try:
            while (item := self._inbox.get()) is not None:
                item()
                while self._job is None and self._waiting and not self._paused:
                    self._begin(self._waiting.popleft())
        finally:
            if self._job is not None and self._job.timer is not None:
                self._job.timer.cancel()
            if self._trainer is not None:
                self._trainer.stop()

    def _warm_up(self) -> None:
        try:
            self._trainer = self._start_trainer()
        except OSError as error:
            self._journal.error("the trainer can't be started", reason=str(error))

    def _start_trainer(self) -> TrainerProcess:
        def hear(trainer: TrainerProcess, line: Heard) -> None:
            self._inbox.put(lambda: self._heard(trainer, line))

        trainer = TrainerProcess(self._site, self._home, self._config, hear)
        self._journal.info("trainer started", pid=trainer.pid)
        return trainer

    def _begin(self, assignment: Assignment) -> None:
        if assignment.cancelled:
            return
        plan = assignment.plan
        self._jobs += 1
        folder = self._home.work / f"{self._jobs}-{plan.run}-{plan.round}"
        job = self._job = Job(self._jobs, assignment, folder)
        assignment.prepares(True)
        reach("job.begun")
        self._journal.info("plan begins", plan=plan.id, kind=plan.kind)
        try:
            trainer = self._trainer_for(plan)
        except OSError as error:
            self._fail(TaskFailed(f"the trainer can't be started: {error.strerror or error}"))
            return
        trainer.send(job.preparation(self._sources, self._config))
        reach("job.prepared")
        self._fetcher.keep(plan.frozen)
        self._move(job, site_pb2.Progress.PREPARING)
        if plan.base:
            self._fetch(job, plan.base, plan.manifest)

    def _trainer_for(self, plan: Plan) -> TrainerProcess:
        """The warm trainer, or a new one if there is none or the task's code has changed since."""
        name = plan.task.name
        digest = self._sources[name].digest
        if self._trainer is not None:
            known = self._trainer.digests.setdefault(name, digest)
            if known == digest:
                return self._trainer
            self._journal.info("the task's code has changed; the trainer starts anew", task=name)
            self._trainer.stop()
        self._trainer = None
        self._trainer = self._start_trainer()
        self._trainer.digests[name] = digest
        return self._trainer

    # -- fetching --------------------------------------------------------------------------------

    def _fetch(self, job: Job, digest: str, manifest: str = "") -> None:
        job.missing.add(digest)
        try:
            path = self._fetcher.at_hand(digest, manifest)
        except (FarflungError, OSError) as error:
            self._fetched(job, digest, why_not(error))
            return
        if path is not None:
            self._fetched(job, digest, path)
            return

        def progress(here: int, total: int) -> None:
            if not job.assignment.cancelled:
                message = told(job.plan.id, site_pb2.Progress.FETCHING, here, total, "bytes")
                self._ears.moved(job.assignment, message)

        self._fetcher.want(
            Want(
                digest,
                manifest,
                wanted=lambda: not job.assignment.cancelled,
                progress=progress,
                done=lambda result: self._inbox.put(lambda: self._fetched(job, digest, result)),
            )
        )

    def _fetched(self, job: Job, digest: str, result: Path | FarflungError) -> None:
        if job is not self._job or job.assignment.cancelled:
            return
        if isinstance(result, FarflungError):
            if self._trainer is not None:
                self._trainer.send(pipe.CancelJob(job=job.number))
            self._fail(result)
            return
        job.files[digest] = result
        reach("job.fetched")
        job.missing.discard(digest)
        if not job.ready:
            self._move(job, site_pb2.Progress.PREPARING)
        self._advance(job)

    def _advance(self, job: Job) -> None:
        """Tell the trainer to do the work once everything for it is there."""
        plan = job.plan
        if not job.ready or job.missing or job.performing or self._trainer is None:
            return
        if job.need_frozen and plan.frozen not in job.files:
            self._fetch(job, plan.frozen)
            return
        state = self._outbox.state(plan.last_counted, plan.run) if plan.last_counted else None
        if plan.last_counted and state is None:
            self._journal.warning(
                "the state that the plan starts from is not here; starting afresh",
                plan=plan.id,
                contribution=plan.last_counted,
            )
        try:
            reserve(job, self._spares)
        except OutOfSpace as error:
            self._fail(error)
            return
        reach("job.reserved")
        job.performing = True
        self._trainer.send(job.order(state, self._home, self._config.trainer.checkpoint))
        reach("job.performing")
        if job.assignment.finishing:
            self._finish(plan.id)
        # Said here: the trainer says how far it is only once it has worked for a while.
        job.phase = "training"
        self._move(job, site_pb2.Progress.TRAINING)

    # -- the trainer's lines ---------------------------------------------------------------------

    def _heard(self, trainer: TrainerProcess, line: Heard) -> None:
        if trainer is not self._trainer:
            return  # of one that was replaced
        if isinstance(line, Died):
            self._died(trainer, line)
            return
        if isinstance(line, pipe.Started):
            self._journal.info("trainer ready", device=line.device, packages=line.packages)
            return
        job = self._job
        if job is None or line.job != job.number:
            return
        match line:
            case pipe.Ready():
                job.loaded(line.need_frozen)
                reach("job.ready")
                if job.missing:
                    self._move(job, site_pb2.Progress.FETCHING)
                self._advance(job)
            case pipe.Progress():
                self._progress(job, line)
            case pipe.Done():
                self._done(job, line)
            case pipe.Cancelled():
                self._end(job)
            case pipe.Failed():
                self._journal.error(
                    "the trainer gave a plan up",
                    plan=job.plan.id,
                    cause=line.cause,
                    where=line.where,
                    message=line.message,
                )
                if line.device_lost:
                    trainer.kill()
                    self._trainer = None
                self._fail_with(job, line.error, self._disclosure.failure(line))

    def _progress(self, job: Job, line: pipe.Progress) -> None:
        if job.assignment.cancelled:
            return
        self._ears.moved(job.assignment, job.progress(line, self._disclosure.loss(line.loss)))

    def _done(self, job: Job, line: pipe.Done) -> None:
        try:
            metrics = self._disclosure.metrics(line.header.metrics)
            header = line.header.model_copy(update={"metrics": metrics})
            index = Index.decode(line.index.encode())
            reach("job.done")
            self._policy.check_contribution(header, index.nbytes)
            plan = job.plan
            entry = self._sign(job.folder, header, index)
            reach("job.admitted")
            if plan.kind == "train":
                self._home.checkpoint.unlink(missing_ok=True)
                reach("job.checkpoint.removed")
        except FarflungError as error:
            self._fail(error)
            return
        except OSError as error:
            self._fail(OutOfSpace(f"the outbox can't be written: {error.strerror or error}"))
            return
        self._journal.info("contribution finished", plan=job.plan.id, contribution=entry.digest)
        self._ears.finished(job.assignment, entry)
        self._end(job)

    def _died(self, trainer: TrainerProcess, line: Died) -> None:
        self._trainer = None
        self._journal.error("trainer ended", cause=line.cause, returncode=line.returncode)
        reach("job.trainer.died")
        job = self._job
        if job is None:
            return
        if job.assignment.cancelled:
            self._end(job)
            return
        if line.from_outside and not job.assignment.begun_again:
            job.assignment.begun_again = True
            self._waiting.appendleft(job.assignment)
            self._end(job)
            return
        text = f"the trainer {line.cause} while {job.phase}; log/trainer.log has its last words"
        if trainer.problem:
            text = f"the trainer can't begin: {trainer.problem}"
        self._fail(TaskFailed(text))

    # -- ends ------------------------------------------------------------------------------------

    def _finish(self, plan_id: str) -> None:
        job = self._job
        if job is not None and job.plan.id == plan_id and job.performing and self._trainer:
            self._trainer.send(pipe.FinishJob(job=job.number))

    def _cancel(self, plan_id: str) -> None:
        job = self._job
        if job is None or job.plan.id != plan_id:
            return  # it waits, and will be skipped; or it is in the outbox, and stays there
        if self._trainer is None:
            self._end(job)
            return
        trainer = self._trainer
        trainer.send(pipe.CancelJob(job=job.number))
        if job.ready and not job.performing:
            self._end(job)  # the trainer is idle and would not answer
            return

        def give_up() -> None:
            self._inbox.put(lambda: self._cancel_ignored(job, trainer))

        job.timer = threading.Timer(CANCEL_GRACE_S, give_up)
        job.timer.daemon = True
        job.timer.start()

    def _cancel_ignored(self, job: Job, trainer: TrainerProcess) -> None:
        if self._job is job and self._trainer is trainer:
            self._journal.warning("the trainer does not stop; it is ended", plan=job.plan.id)
            trainer.kill()

    def _fail(self, error: FarflungError) -> None:
        job = self._job
        if job is not None:
            self._fail_with(job, type(error).__name__, self._disclosure.own(error))

    def _fail_with(self, job: Job, error: str, text: str) -> None:
        if not job.assignment.cancelled:
            self._journal.error("plan failed", plan=job.plan.id, error=error, reason=text)
            self._ears.failed(job.assignment, error, text)
        self._end(job)

    def _end(self, job: Job) -> None:
        job.assignment.prepares(False)
        if job.timer is not None:
            job.timer.cancel()
        shutil.rmtree(job.folder, ignore_errors=True)
        reach("job.removed")
        self._job = None
        if self._trainer is not None and not self._config.trainer.keep_warm:
            self._trainer.stop()
            self._trainer = None

    def _move(self, job: Job, state: site_pb2.Progress.State.ValueType) -> None:
        self._ears.moved(job.assignment, told(job.plan.id, state))
