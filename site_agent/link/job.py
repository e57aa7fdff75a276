"""The plan in work, what it has so far, and who hears of it."""

from __future__ import annotations

import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from protos.errors import OutOfSpace
from protos.plan import Plan
from protos.spares import Spares
from protos.v1 import site_pb2
from site_agent.link.outbox import Entry
from site_agent.link.plans import Assignment


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
