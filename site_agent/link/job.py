"""The plan in work, what it has so far, and who hears of it."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from protos.errors import OutOfSpace
from protos.plan import Plan
from protos.spares import Spares
from protos.v1 import site_pb2
from site_agent import pipe
from site_agent.config import SiteConfig
from site_agent.home import Home
from site_agent.link.outbox import Entry
from site_agent.link.plans import Assignment
from site_agent.task_source import TaskSource


class Ears(Protocol):
    """Who hears how the work goes."""

    def moved(self, assignment: Assignment, progress: site_pb2.Progress) -> None:
        """A plan is in another state, or further."""

    def finished(self, assignment: Assignment, entry: Entry) -> None:
        """A contribution is in the outbox."""

    def failed(self, assignment: Assignment, error: str, text: str) -> None:
        """A plan ends without a contribution; the text may leave the site."""


@dataclass
class Job:
    """The plan in work.

    Attributes:
        number: Carried by all lines about it.
        assignment: The plan.
        folder: Where its contribution comes to be.
        files: What was fetched, by digest.
        missing: Digests that it still waits for.
        ready: The trainer has loaded the task.
        need_frozen: The frozen part has to be fetched too.
        performing: The trainer was told to do the work.
        phase: In words, for the case that the trainer dies.
        timer: Ends a trainer that does not heed a cancellation.
    """

    number: int
    assignment: Assignment
    folder: Path
    files: dict[str, Path] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    ready: bool = False
    need_frozen: bool = False
    performing: bool = False
    phase: str = "loading the task"
    timer: threading.Timer | None = None

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.assignment.plan

    def preparation(self, sources: Mapping[str, TaskSource], config: SiteConfig) -> pipe.Prepare:
        """What the trainer is told first: to load the plan's task."""
        task = self.plan.task.name
        return pipe.Prepare(
            job=self.number,
            plan=self.plan,
            source=sources[task].text,
            settings=config.tasks[task].settings,
        )

    def order(self, state: Path | None, home: Home, save: str | float) -> pipe.Perform:
        """What the trainer is told once everything for the work is there.

        Args:
            state: Folder of the state to start from.
            home: The site's.
            save: ``trainer.checkpoint``.
        """
        base = self.files.get(self.plan.base)
        return pipe.Perform(
            job=self.number,
            base=str(base) if base else "",
            frozen=str(self.files[self.plan.frozen]) if self.need_frozen else "",
            state=str(state) if state else "",
            out=str(self.folder),
            spares=str(home.spares().folder),
            checkpoint="" if save == "never" else str(home.checkpoint),
            checkpoint_s=save if isinstance(save, float) else None,
        )

    def loaded(self, need_frozen: bool) -> None:
        """The trainer has loaded the task: from here on it is the base that is waited for, if anything."""
        self.ready, self.need_frozen = True, need_frozen
        self.phase = "waiting for the base"
        self.assignment.prepares(False)

    def progress(self, line: pipe.Progress, loss: float) -> site_pb2.Progress:
        """What the trainer said of how far it is, for the orchestrator, and the phase from now on."""
        self.phase = "encoding the update" if line.state == "ENCODING" else "training"
        if line.unit:
            self.phase += f" ({line.done:.4g} of {line.planned:.4g} {line.unit} done)"
        return site_pb2.Progress(
            plan_id=self.plan.id,
            state=site_pb2.Progress.State.Value(line.state),
            done=line.done,
            planned=line.planned,
            unit=line.unit,
            loss=loss,
            learning_rate=line.learning_rate,
            examples_per_s=line.examples_per_s,
        )


def reserve(job: Job, spares: Spares) -> None:
    """Check that a contribution and the next state will fit on the disk; spares go before that fails.

    Raises:
        OutOfSpace: They won't.
    """
    needed = 2 * sum(file.stat().st_size for file in job.files.values())
    free = shutil.disk_usage(job.folder.parent).free
    if free < needed:
        free += spares.clear()
    if free < needed:
        raise OutOfSpace(
            f"a contribution may need {needed} bytes, and {free} are free at this site",
            needed=needed,
            free=free,
        )
