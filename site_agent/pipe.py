"""What link and trainer say to each other: one line of JSON each, on the trainer's stdin and stdout.

Models and contributions pass through files; these lines name them. No key and no path of a key is
ever in them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from protos.contribution import Header
from protos.errors import DataCorrupt
from protos.plan import Plan

MAX_LINE_BYTES = 128 << 20
"""A header and an index at their largest, and some."""


class Line(BaseModel):
    """Base of all lines."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def encode(self) -> bytes:
        """The line, with its end."""
        return self.model_dump_json().encode() + b"\n"


class Prepare(Line):
    """Load the plan's task and build its model.

    Attributes:
        job: Number that all lines about this plan carry.
        plan: The plan.
        source: Where the task's code is.
        settings: The site's settings of the task.
    """

    op: Literal["prepare"] = "prepare"
    job: int
    plan: Plan
    source: str
    settings: dict[str, Any]


class Perform(Line):
    """Do the prepared plan's work.

    Attributes:
        job: As in ``Prepare``.
        base: File of the base, which has the plan's manifest; empty for init.
        frozen: File of the frozen part, if it was asked for.
        state: Folder that holds the site's state to start from; empty for none.
        out: A folder that must not exist; at the end it holds payload and next state.
        spares: Folder of files that may be written over.
        checkpoint: File in which training is saved half-way; empty for nowhere.
        checkpoint_s: Seconds between two saves; None for every end of an epoch.
    """

    op: Literal["perform"] = "perform"
    job: int
    base: str = ""
    frozen: str = ""
    state: str = ""
    out: str
    spares: str = ""
    checkpoint: str = ""
    checkpoint_s: float | None = None


class CancelJob(Line):
    """Stop working on a job, between two steps."""

    op: Literal["cancel"] = "cancel"
    job: int


class FinishJob(Line):
    """End a job's training at the next step boundary, and contribute what is done."""

    op: Literal["finish"] = "finish"
    job: int


class Quit(Line):
    """End the process."""

    op: Literal["quit"] = "quit"


class Started(Line):
    """The trainer is there.

    Attributes:
        packages: Names and versions that decide the bits.
        device: Where it trains.
    """

    event: Literal["started"] = "started"
    packages: dict[str, str]
    device: str


class Ready(Line):
    """The task is loaded.

    Attributes:
        need_frozen: The frozen part has to be fetched: this site's own has other bits.
    """

    event: Literal["ready"] = "ready"
    job: int
    need_frozen: bool = False


class Progress(Line):
    """How far a job is; see ``Progress`` in protos/v1/site.proto."""

    event: Literal["progress"] = "progress"
    job: int
    state: Literal["TRAINING", "ENCODING"]
    done: float = 0.0
    planned: float = 0.0
    unit: str = ""
    loss: float | None = None
    learning_rate: float = 0.0
    examples_per_s: float = 0.0


class Done(Line):
    """The contribution is complete in its folder. The link syncs it.

    Attributes:
        header: Its draft: the link applies the site's policy to its metrics and signs it.
        index: Of the payload, as `protos.manifest.Index` encodes it.
    """

    event: Literal["done"] = "done"
    job: int
    header: Header
    index: str


class Cancelled(Line):
    """The job was stopped."""

    event: Literal["cancelled"] = "cancelled"
    job: int


class Failed(Line):
    """The job can't be done; job 0 is the trainer's start.

    Attributes:
        error: Class name in protos/errors.py.
        cause: Class name of what was raised.
        where: "file.py:line", without folders.
        message: What it says; leaves the site only if the policy allows it, or if ``ours``.
        ours: The text was written by Farflung about tensors, keys and versions: no data in it.
        system: What the operating system said (the file's name is not in it).
        out_of_memory: Memory of the host or the device was not enough.
        shared_memory: /dev/shm was not enough for what the loaders hand over.
        device_lost: The device failed, and with it whatever this process would still do on it.
    """

    event: Literal["failed"] = "failed"
    job: int
    error: str
    cause: str
    where: str = ""
    message: str = ""
    ours: bool = False
    system: str = ""
    out_of_memory: bool = False
    shared_memory: bool = False
    device_lost: bool = False


Order = Annotated[Prepare | Perform | CancelJob | FinishJob | Quit, Field(discriminator="op")]
Event = Annotated[
    Started | Ready | Progress | Done | Cancelled | Failed, Field(discriminator="event")
]

_ORDERS: TypeAdapter[Prepare | Perform | CancelJob | FinishJob | Quit] = TypeAdapter(Order)
_EVENTS: TypeAdapter[Started | Ready | Progress | Done | Cancelled | Failed] = TypeAdapter(Event)


def read_order(line: bytes) -> Prepare | Perform | CancelJob | FinishJob | Quit:
    """The order of a line.

    Raises:
        DataCorrupt: It is none.
    """
    try:
        return _ORDERS.validate_json(line)
    except ValidationError as error:
        raise DataCorrupt(f"trainer: not an order: {error.error_count()} problems") from None


def read_event(line: bytes) -> Started | Ready | Progress | Done | Cancelled | Failed:
    """The event of a line.

    Raises:
        DataCorrupt: It is none.
    """
    try:
        return _EVENTS.validate_json(line)
    except ValidationError as error:
        raise DataCorrupt(f"trainer: not an event: {error.error_count()} problems") from None
