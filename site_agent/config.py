"""``site.toml``: which tasks this site has, what it accepts, and how it trains.

TOML in, frozen values out. Unknown keys are refused; every error names the file and the key's path.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from protos.contribution import Statistic
from protos.errors import ConfigInvalid
from protos.plan import Name, first_problem, problem_key
from site_agent.task_source import TaskSource

_HOURS = re.compile(r"([01]\d|2[0-4]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)\Z")

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
MBIT_BYTES = 10**6 / 8

Positive = Annotated[float, Field(gt=0)]


def _hours(value: str) -> str:
    if _HOURS.match(value) is None:
        raise ValueError('must look like "22:00-06:00"')
    return value


Hours = Annotated[str, AfterValidator(_hours)]
"""Local time, "HH:MM-HH:MM"; the end is not part of it, and may lie on the next day."""


def _minutes(hours: str) -> tuple[int, int]:
    """Begin and end in minutes after midnight."""
    start, end = (int(part[:2]) * 60 + int(part[3:]) for part in hours.split("-"))
    return start, end


def _cap(value: float) -> float:
    if value < 0 or 0 < value < LEAST_CAP_MBIT_PER_S:
        raise ValueError(f"must be 0 (no cap) or at least {LEAST_CAP_MBIT_PER_S:g}")
    return value


LEAST_CAP_MBIT_PER_S = 0.1
"""Below it a connection is too slow to be told from a dead one."""

Cap = Annotated[float, AfterValidator(_cap)]


class Section(BaseModel):
    """Base: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SiteSection(Section):
    """The table [site].

    Attributes:
        device: Where to train: auto (CUDA where there is one), cpu, cuda, or cuda:N.
        keep_states: States of this many counted contributions are kept for each run, so that
            a run that is rolled back finds the state that fits.
        keep_bases: Fetched models that stay in the cache: disk for each, and for a plan whose
            model is not among them one more download. A frozen part counts too.
    """

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    keep_states: int = Field(5, ge=1, le=1000)
    keep_bases: int = Field(2, ge=2, le=1000)


class TaskSection(Section):
    """A table [tasks.NAME].

    Attributes:
        source: "path.py:Class" (relative to the folder of site.toml) or "module:Class".
        settings: What only this site knows, such as where its data lies. Never sent.
    """

    source: str
    settings: dict[str, Any] = {}


class PolicySection(Section):
    """The table [policy]: what this site accepts and lets out.

    Attributes:
        strategies: Names of strategies, or "all".
        max_epochs: Most local work of a round, in epochs.
        max_steps: The same in optimizer steps.
        max_tokens: The same in tokens.
        max_seconds: The same in seconds.
        max_bytes: Largest model or contribution.
        hours: Local time in which plans are accepted, "HH:MM-HH:MM"; may pass midnight.
        init: Whether this site may be asked for the first base of a run.
        side_payloads: Which merge rules of side payloads may leave.
        condensed_data: Whether examples that were condensed from this site's data may leave. They
            are made to train others as the data would, can look like it, and can't be taken back.
        error_text: code (class, file and line), or full (the message too).
        metrics: Names of metrics that may leave (``*`` matches anything), or "all".
    """

    strategies: tuple[str, ...] | Literal["all"] = "all"
    max_epochs: Positive | None = None
    max_steps: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    max_seconds: Positive | None = None
    max_bytes: int | None = Field(None, ge=1)
    hours: Hours = "00:00-24:00"
    init: bool = True
    side_payloads: tuple[Statistic, ...] = ("sum", "mean by count")
    condensed_data: bool = False
    error_text: Literal["code", "full"] = "code"
    metrics: tuple[str, ...] | Literal["all"] = "all"

    def open_at(self, now: time) -> bool:
        """Whether a local time lies within ``hours``."""
        start, end = _minutes(self.hours)
        minute = now.hour * 60 + now.minute
        if start <= end:
            return start <= minute < end
        return minute >= start or minute < end


class TrainerSection(Section):
    """The table [trainer]: the process that trains.

    Attributes:
        command: How it is started; empty for this Python. It gets further arguments.
        memory_bytes: Most memory that it may allocate; None for no limit.
        precision: auto (bf16 on CUDA where the device has it, else fp32), fp32 or bf16.
        keep_warm: Stay loaded between rounds; false gives a GPU back after each.
        threads: Threads of torch; None leaves it to torch.
        loader_workers: Processes that load data sets which aren't plain tensors.
        environment: Names of further environment variables that it may see.
        checkpoint: When training is saved half-way, so that a trainer or agent that is killed goes
            on there: "epoch" (at the end of every epoch of a second or more), a number (after so many
            seconds, also in the middle of an epoch), or "never". One file, as large as the model
            with its optimizer and the strategies' states, and a second one while it is written.
    """

    command: tuple[str, ...] = ()
    memory_bytes: int | None = Field(None, ge=1 << 20)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    keep_warm: bool = True
    threads: int | None = Field(None, ge=1, le=4096)
    loader_workers: int = Field(0, ge=0, le=256)
    environment: tuple[str, ...] = ()
    checkpoint: Literal["epoch", "never"] | Positive = "epoch"


class WindowSection(Section):
    """A table [[network.windows]]: a time in which models and contributions may move.

    Attributes:
        days: Days on which it begins, "mon" to "sun"; none for every day.
        hours: Local time, "HH:MM-HH:MM"; may pass midnight.
        up_mbit_per_s: Cap inside it, towards the orchestrator; None for the one of [network].
        down_mbit_per_s: The same, from the orchestrator.
    """

    days: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = ()
    hours: Hours
    up_mbit_per_s: Cap | None = None
    down_mbit_per_s: Cap | None = None

    @field_validator("hours")
    @classmethod
    def _some_time(cls, value: str) -> str:
        start, end = _minutes(value)
        if start == end:
            raise ValueError('is no time at all; a whole day is "00:00-24:00"')
        return value

    def spans(self, now: datetime) -> list[tuple[datetime, datetime]]:
        """The times around ``now`` (local, without a zone) in which it is open: a week, both ways."""
        start, end = _minutes(self.hours)
        minutes = end - start if end > start else end - start + DAY_MINUTES
        midnight = datetime.combine(now.date(), time())
        begins = (midnight + timedelta(days=d, minutes=start) for d in range(-7, 9))
        return [
            (begin, begin + timedelta(minutes=minutes))
            for begin in begins
            if not self.days or _DAYS[begin.weekday()] in self.days
        ]


@dataclass(frozen=True)
class Allowance:
    """What [network] allows at a moment.

    Attributes:
        is_open: Whether models and contributions may move.
        up_mbit_per_s: Cap towards the orchestrator; 0 for none.
        down_mbit_per_s: Cap from the orchestrator; 0 for none.
        changes: When a window begins or ends next, local time; None for never.
    """

    is_open: bool
    up_mbit_per_s: float
    down_mbit_per_s: float
    changes: datetime | None

    @property
    def rules(self) -> tuple[bool, float, float]:
        """All but when it changes."""
        return self.is_open, self.up_mbit_per_s, self.down_mbit_per_s


class NetworkSection(Section):
    """The table [network].

    Attributes:
        address: host:port of the orchestrator; empty for the one of the join token.
        server_name: Name to expect in the orchestrator's certificate where the address is
            another one (a tunnel, a forwarded port).
        bulk_address: host:port for models and contributions where the one that the orchestrator
            names for them is not reachable; not used if it names none.
        up_mbit_per_s: Most that contributions take of the line, in 10^6 bits a second; 0 for no cap.
        down_mbit_per_s: The same for models that are fetched.
        windows: When models and contributions may move; none for always.
    """

    address: str = Field("", pattern=r"^$|^.+:\d+$")
    server_name: str = ""
    bulk_address: str = Field("", pattern=r"^$|^.+:\d+$")
    up_mbit_per_s: Cap = 0.0
    down_mbit_per_s: Cap = 0.0
    windows: tuple[WindowSection, ...] = ()

    def at(self, now: datetime) -> Allowance:
        """What is allowed at a local time; of several open windows the first one's caps count."""
        wall = now.replace(tzinfo=None)
        spans = [(window, *span) for window in self.windows for span in window.spans(wall)]
        changes = min((t for _, *ends in spans for t in ends if t > wall), default=None)
        inside = next((w for w, begin, end in spans if begin <= wall < end), None)
        up, down = self.up_mbit_per_s, self.down_mbit_per_s
        if inside is not None and inside.up_mbit_per_s is not None:
            up = inside.up_mbit_per_s
        if inside is not None and inside.down_mbit_per_s is not None:
            down = inside.down_mbit_per_s
        return Allowance(inside is not None or not self.windows, up, down, changes)


class SiteConfig(Section):
    """A whole ``site.toml``."""

    site: SiteSection = SiteSection()
    tasks: dict[Name, TaskSection] = {}
    policy: PolicySection = PolicySection()
    trainer: TrainerSection = TrainerSection()
    network: NetworkSection = NetworkSection()

    @classmethod
    def parse(cls, text: str, where: str = "site.toml") -> SiteConfig:
        """The configuration of a TOML document.

        Raises:
            ConfigInvalid: Not TOML, or a key is missing, unknown or out of range; names the key.
        """
        try:
            config = cls.model_validate(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigInvalid(f"{where}: not TOML: {error}", file=where) from None
        except ValidationError as error:
            raise ConfigInvalid(
                f"{where}: {first_problem(error)}", file=where, key=problem_key(error)
            ) from None
        for name, task in config.tasks.items():
            TaskSource.parse(task.source, Path(), f"{where}: tasks.{name}.source")
        return config

    @classmethod
    def load(cls, path: Path) -> SiteConfig:
        """The configuration of a file; the defaults if there is none.

        Raises:
            ConfigInvalid: See ``parse``.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return cls()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigInvalid(f"{path}: can't be read ({type(error).__name__})") from None
        return cls.parse(text, str(path))

    def sources(self, folder: Path) -> dict[str, TaskSource]:
        """Where each task's code is; relative paths are relative to ``folder``."""
        return {
            name: TaskSource.parse(task.source, folder, f"tasks.{name}.source")
            for name, task in self.tasks.items()
        }


TEMPLATE = """\
# What this data center has and accepts. Nothing in this file is ever sent.
# `farflung-site doctor` checks it. A running agent takes up changes of [policy] and of the caps and
# windows of [network] by itself; everything else needs a restart.

[site]
# device = "auto"            # auto | cpu | cuda | cuda:1

# One table for each task. Code never travels: a plan names the task, this file says where it is.
#
# [tasks.fashion_mnist]
# source = "path/to/file.py:FashionMnist"     # or "installed.module:FashionMnist"
# settings = { data = "path/to/data" }        # this site's own; never sent

[policy]
# strategies = "all"         # or ["co_learning", "temperature"]
# max_epochs = 40            # most local work of one round; also max_steps, max_tokens, max_seconds
# max_bytes = 2_000_000_000  # largest model or contribution
# hours = "00:00-24:00"      # local time in which plans are accepted
# init = true                # may be asked for the first base of a run
# side_payloads = ["sum", "mean by count"]    # also "concatenate", "keep per site"
# condensed_data = false     # true lets synthetic examples leave that are made from this site's data.
#                            # Privacy: they are optimised to stand in for the data, may resemble
#                            # single samples, carry no guarantee, and can't be called back.
# error_text = "code"        # class, file and line; "full" sends the message too
# metrics = "all"            # or ["train_loss"]

[trainer]
# command = ["torchrun", "--nproc-per-node=1", "-m", "site_agent.trainer"]
# memory_bytes = 16_000_000_000
# precision = "auto"         # bf16 on CUDA where the device has it
# keep_warm = true           # false gives the GPU back after each round
# threads = 4
# environment = ["MY_DATA_ROOT"]              # further variables that the task may see
# checkpoint = "epoch"       # when training is saved half-way; or seconds (600), or "never"

[network]
# address = "orchestrator.example:8470"       # where the join token's address is not reachable
# server_name = "localhost"                   # name in its certificate, if dialled under another
# bulk_address = "orchestrator.example:8472"  # where its gateways, if it has any, are not reachable
# up_mbit_per_s = 20         # most that contributions take of the line; 0 for no cap
# down_mbit_per_s = 100      # most that fetched models take
#
# Models and contributions move inside these times only; none for always.
#
# [[network.windows]]
# days = ["mon", "tue", "wed", "thu", "fri"]  # on which it begins; absent for every day
# hours = "20:00-06:00"      # local time
# up_mbit_per_s = 200        # another cap inside it
"""
