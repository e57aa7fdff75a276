"""What a site does for a plan: train, assess, or give the first base. Each ends in one folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch

from protos.contribution import Header
from protos.digest import canonical, digest
from protos.errors import DataCorrupt, TaskFailed
from protos.faults import reach
from protos.manifest import Index, Placement
from protos.plan import Plan
from protos.spares import Spares
from protos.tensors import ArtefactFile, iterate_bytes
from site_agent.pipe import Progress
from site_agent.trainer import inner_optimizer
from site_agent.trainer.assessing import assess, kept
from site_agent.trainer.checkpoint import Checkpoints
from site_agent.trainer.fitting import Fitted, fit
from site_agent.trainer.payload import Blocks, Contribution, blocks_of
from site_agent.trainer.randomness import round_generator
from site_agent.trainer.site_state import SiteState
from site_agent.trainer.update import Differences
from site_agent.trainer.watch import Watch
from site_agent.trainer.workload import Workload
from strategies.context import SidePayload, Update
from strategies.stack import State


@dataclass
class Clock:
    """Wall seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)
    now: Callable[[], float] = monotonic

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is inside."""
        started = self.now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - started


@dataclass
class Exchange:
    """One plan at this site.

    Attributes:
        work: Task and model.
        plan: The plan.
        watch: The line to the link.
        clock: Seconds by phase.
        base: File of the base.
        state: Folder of the state to start from; None for none.
        out: Where the contribution goes.
        spares: Files that may be written over.
        checkpoint: File in which training is saved half-way; None for nowhere.
        checkpoint_s: See `Checkpoints`.
    """

    work: Workload
    plan: Plan
    watch: Watch
    clock: Clock
    base: Path | None
    state: Path | None
    out: Path
    spares: Spares | None = None
    checkpoint: Path | None = None
    checkpoint_s: float | None = None

    def perform(self) -> tuple[Header, Index]:
        """Do it; gives the header's draft and the payload's index.

        Raises:
            FarflungError: What is wrong, naming site and tensor.
            JobCancelled: The link does not want it any more.
        """
        match self.plan.kind:
            case "train":
                made = self._train()
            case "init":
                made = self._first_base()
            case _:
                made = self._assess()
        made.task_digest = self.work.task_digest
        made.packages = self.work.device.packages()
        with self.clock.phase("encoding"):
            index = made.write(self.out, self.spares)
        made.seconds = {name: round(value, 6) for name, value in self.clock.seconds.items()}
        return made.header(index), index

    # -- train --------------------------------------------------------------------------------

    def _train(self) -> Contribution:
        """adopt, fit, encode."""
        work, plan = self.work, self.plan
        base, remembered = self._start()
        theirs = dict(base)
        adopted, state = work.stack.adopt(dict(theirs), remembered.strategies, plan)
        work.load({n: v for n, v in adopted.items() if v is not theirs.get(n)})
        reach("train.adopted")
        with self.clock.phase("training"):
            fitted = fit(
                work, plan, theirs, state, remembered.optimizer, self.watch,
                checkpoints=self._checkpoints(),
            )  # fmt: skip
        reach("train.fitted")
        self.watch.tell(Progress(job=self.watch.job, state="ENCODING"))
        with self.clock.phase("encoding"):
            return self._encode(base, fitted)

    def _checkpoints(self) -> Checkpoints | None:
        if self.checkpoint is None:
            return None
        work, started = self.work, self.state is not None
        decides = [work.key, work.task_digest, work.device.packages(), started]
        mark = digest(canonical([self.plan.work_digest, *decides]))
        return Checkpoints(self.checkpoint, mark, self.checkpoint_s)

    def _encode(self, base: ArtefactFile, fitted: Fitted) -> Contribution:
        work, plan = self.work, self.plan
        covered = work.shared.covering(plan.groups)
        work.model.eval()
        update = Update(
            tensors=Differences(covered, base, work.state()),
            examples=fitted.examples,
            steps=fitted.steps,
            epochs=fitted.epochs,
            model=work.model,
            task=work.task,
            generator=round_generator(plan),
        )
        with torch.no_grad():
            update, strategies = work.stack.encode(update, plan, fitted.state)
        reach("train.encoded")
        codec = work.stack.codec.name if work.stack.codec and update.blocks is not None else ""
        metrics = {"train_loss": fitted.losses[1], "train_loss_first": fitted.losses[0]}
        if plan.last_counted and self.state is None:
            metrics["train_state_missing"] = 1.0
        return Contribution(
            plan=plan,
            manifest=covered.digest,
            blocks=blocks_of(work.site, covered, update, codec),
            payloads=update.payloads,
            examples=fitted.examples,
            steps=fitted.steps,
            epochs=fitted.epochs,
            partial=fitted.partial,
            metrics=metrics,
            state=self._next_state(strategies, fitted),
        )

    def _next_state(self, strategies: State, fitted: Fitted) -> SiteState:
        keep = self.plan.optimizer.keep_state
        return SiteState(
            own=self.work.values(self.work.own),
            strategies=strategies,
            optimizer=inner_optimizer.saved(fitted.optimizer, self.work.model) if keep else {},
        )

    def _start(self) -> tuple[ArtefactFile, SiteState]:
        """The base, loaded into the model, and what this site remembers."""
        if self.base is None:
            raise TaskFailed(f"site {self.work.site}: the plan names no base")
        base = self.work.read_base(self.base, self.plan.manifest)
        remembered = self._remembered()
        self.work.reset()
        self.work.fill(base)
        self.work.load({n: v for n, v in remembered.own.items() if n in self.work.own})
        reach("train.begun")
        return base, remembered

    def _remembered(self) -> SiteState:
        # Of a state an assessment needs the tensors placed here, and else nothing.
        if self.state is not None and (self.plan.kind == "train" or self.work.own):
            try:
                return SiteState.read(self.state)
            except DataCorrupt as error:
                sys.stderr.write(f"this site begins afresh: {error}\n")
                self.state = None  # as if it were gone, which is told
        return SiteState()

    # -- init ------------------------------------------------------------------------------------

    def _first_base(self) -> Contribution:
        """The model as it was built: the shared part as an artefact, the rest as side payloads."""
        work = self.work
        state = work.state()
        sides = {"init/manifest": _bytes(work.shared.encoded)}
        places: tuple[Placement, ...] = ("frozen", "orchestrator")
        for place in places:
            part = work.manifest.of(place)
            if len(part):
                sides[f"init/{place}"] = _bytes(b"".join(iterate_bytes(part, state)))
                sides[f"init/{place}_manifest"] = _bytes(part.encoded)
        return Contribution(
            plan=self.plan,
            manifest=work.shared.digest,
            blocks=Blocks(iterate_bytes(work.shared, state)),
            payloads=sides,
        )

    # -- assess ----------------------------------------------------------------------------------

    def _assess(self) -> Contribution:
        """The candidate as it is: `adopt` is not asked, so that all sites score the same model."""
        if not kept(self.work, self.plan):
            self._start()
        with self.clock.phase("assessing"):
            sums, samples = assess(self.work, self.plan, self.watch)
        reach("assess.summed")
        return Contribution(
            plan=self.plan,
            manifest=self.work.shared.digest,
            payloads={name: SidePayload(value) for name, value in sums.items()},
            examples=samples,
        )


def _bytes(data: bytes) -> SidePayload:
    return SidePayload(torch.frombuffer(bytearray(data), dtype=torch.uint8), "keep per site")
