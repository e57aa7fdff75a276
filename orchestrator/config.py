"""Configuration of a run (``run.toml``) and of the daemon (``farflung.toml`` in its home).

TOML in, frozen values out. Unknown keys are refused; every error names the file and the key's path.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from protos.digest import canonical, digest
from protos.errors import ConfigInvalid
from protos.plan import (
    Name,
    OptimizerChoice,
    StrategyChoice,
    TaskChoice,
    Work,
    first_problem,
    problem_key,
)

DEFAULT_HOME = Path("~/.farflung")

Count = Annotated[int, Field(ge=0)]

Parsed = TypeVar("Parsed", bound="Section")


class Section(BaseModel):
    """Base: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Init(Section):
    """Where the first base comes from.

    Attributes:
        start: "task" (the orchestrator builds it; needs the task in [tasks]), "site:NAME",
            "FILE.safetensors", "RUN@ROUND" or "RUN@best". Key ``from`` in the file.
        digest: Of the file's bytes in the store; set at launch, not by people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    start: str = Field("task", alias="from", min_length=1)
    digest: str = ""


class CohortSection(Section):
    """Who takes part.

    Attributes:
        sites: Names, or "all" sites enrolled when a round is planned.
        quorum: Contributions without which a round isn't closed, or "all".
        deadline_s: The only time-out that a user sets; > 0.
        attempts: Attempts of one round before the run is paused.
    """

    sites: tuple[Name, ...] | Literal["all"] = "all"
    quorum: int | Literal["all"] = "all"
    deadline_s: float = Field(3600.0, gt=0)
    attempts: int = Field(3, ge=1, le=100)

    @field_validator("quorum")
    @classmethod
    def _positive(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError('quorum must be at least 1, or "all"')
        return value

    @model_validator(mode="after")
    def _reachable(self) -> CohortSection:
        if self.sites != "all":
            if len(set(self.sites)) != len(self.sites) or not self.sites:
                raise ValueError("sites must be different names, at least one")
            if isinstance(self.quorum, int) and self.quorum > len(self.sites):
                raise ValueError(
                    f"quorum {self.quorum} can't be reached by {len(self.sites)} sites"
                )
        return self


class LocalSection(Section):
    """What a site does in a round, before strategies change it.

    Attributes:
        work: epochs, steps, tokens or seconds.
        batch_size: Samples of a step.
        lr: Peak learning rate.
        optimizer: Inner optimizer.
        gradient_clip: Largest global gradient norm.
    """

    work: Work = Work(epochs=5)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(0.1, gt=0)
    optimizer: OptimizerChoice = OptimizerChoice()
    gradient_clip: float | None = Field(None, gt=0)


class AssessSection(Section):
    """Whether candidates are evaluated at the sites.

    Attributes:
        every: Assess every n-th round (and the last one); 0: never.
    """

    every: int = Field(1, ge=0)


class RunConfig(Section):
    """A run file.

    Attributes:
        name: Of the run; its id is made of it.
        rounds: How many.
        seed: Of all randomness of the run, at every site.
        on_error: Whether a round goes on without a plug-in that fails, or is held.
        tolerance: How much worse plug-ins may make the average at the sites' validation data: the
            accuracy lost, as a share (0.01 is one point), or, of a task without accuracy, the share
            by which the loss grows. One that costs more counts as failed. None: nobody judges.
        references: Scores to draw beside the run's own, such as ``centralised = 0.881`` (accuracy)
            or ``"centralised.test.nll" = 0.36``; nothing depends on them.
    """

    name: Name
    rounds: int = Field(ge=1, le=1_000_000)
    seed: int = Field(0, ge=0, lt=1 << 62)
    task: TaskChoice
    init: Init = Init()
    cohort: CohortSection = CohortSection()
    local: LocalSection = LocalSection()
    assess: AssessSection = AssessSection()
    strategy: tuple[StrategyChoice, ...] | None = None
    on_error: Literal["skip", "hold"] = "skip"
    tolerance: float | None = Field(None, ge=0)
    references: dict[str, float] = {}

    @field_validator("strategy", mode="before")
    @classmethod
    def _flat(cls, value: Any) -> Any:
        """[[strategy]] tables carry name, rounds, and the hyperparameters beside them."""
        if not isinstance(value, list):
            return value
        out = []
        for row in value:
            if isinstance(row, str):
                row = {"name": row}
            if isinstance(row, dict) and "params" not in row:
                params = {k: v for k, v in row.items() if k not in ("name", "rounds")}
                kept = {k: v for k, v in row.items() if k in ("name", "rounds")}
                row = {**kept, "params": params}
            out.append(row)
        return out

    @property
    def stack(self) -> tuple[StrategyChoice, ...]:
        """The strategies: co-learning where the file says nothing, FedAvg for an empty list."""
        if self.strategy is None:
            return (StrategyChoice(name="co_learning"),)
        return self.strategy

    @property
    def digest(self) -> str:
        """Digest of the resolved configuration."""
        return digest(canonical(self.resolved))

    @property
    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as JSON."""
        out = self.model_dump(mode="json", by_alias=True)
        out["strategy"] = [c.model_dump(mode="json") for c in self.stack]
        return out

    @classmethod
    def from_resolved(cls, document: dict[str, Any]) -> RunConfig:
        """The configuration that a ledger's entry holds."""
        return cls.model_validate(document)


class ListenSection(Section):
    """The port that sites dial.

    Attributes:
        bind: host:port to listen on. Port 0 takes a free one.
        address: host:port that join tokens tell the sites; the bound one if empty.
        hosts: Names and addresses that the server's certificate carries.
    """

    bind: str = "127.0.0.1:8470"
    address: str = ""
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1")


class GatewaysSection(Section):
    """Processes that carry models and contributions in the daemon's place.

    Attributes:
        processes: How many; 0: the daemon carries them itself.
        bind: host:port that all of them listen on. Port 0 takes a free one. Empty: port 8472 of the
            host of ``listen.bind``.
        address: host:port that sites dial for them, where a balancer stands in front; empty: the
            bound port of the host by which a site reaches the daemon.
    """

    processes: int = Field(0, ge=0, le=64)
    bind: str = Field("", pattern=r"^(.+:\d{1,5})?$")
    address: str = Field("", pattern=r"^(.+:\d{1,5})?$")


class DashboardSection(Section):
    """The page.

    Attributes:
        host: Address to listen on; of loopback only.
        port: 0 takes a free one; -1 turns the page off.
    """

    host: str = "127.0.0.1"
    port: int = Field(8471, ge=-1, le=65535)


class RaySection(Section):
    """Ray.

    Attributes:
        address: HOST:PORT of the head of a Ray cluster to use, of which this host must be a node;
            empty: a Ray of its own, closed off from everything.
        token_file: The cluster's authentication token; an absolute path, not in the home's keys.
        cpus: CPUs that reducers and plug-ins may use; 0: all but one, at least one. A cluster says
            itself how many it has.
        object_store_bytes: Ray's shared memory; no weights pass through it.
        private_networks: Networks on which Ray may listen where it can't be confined; a cluster
            never can.
        plugins_may_reach_keys: Run plug-ins even on a host that grants no namespaces.
    """

    address: str = Field("", pattern=r"^([^\s:]+:\d{1,5})?$")
    token_file: str = Field("", pattern=r"^(/.*)?$")
    cpus: int = Field(0, ge=0)
    object_store_bytes: int = Field(100 << 20, ge=75 << 20)
    private_networks: tuple[str, ...] = ()
    plugins_may_reach_keys: bool = False

    @model_validator(mode="after")
    def _authenticated(self) -> RaySection:
        if self.address and not self.token_file:
            raise ValueError("a cluster by address needs token_file: Ray runs code that it is sent")
        return self


class PluginSection(Section):
    """Limits of a plug-in at the orchestrator.

    Attributes:
        seconds: Wall seconds.
        memory_bytes: Address space.
    """

    seconds: float = Field(600.0, gt=0)
    memory_bytes: int = Field(8 << 30, ge=256 << 20)


class RetentionSection(Section):
    """What is kept besides the newest and the best model of every run.

    Models go with ``gc``. Contributions go by themselves once enough later rounds are committed.

    Attributes:
        models: Models of the last n rounds of a run, or "all".
        contributions: Contributions of the last n rounds of a run, or "all".
    """

    models: Count | Literal["all"] = "all"
    contributions: Count | Literal["all"] = 1


class SitesSection(Section):
    """Times that follow from the heartbeat.

    Attributes:
        heartbeat_s: How often a site says that it lives.
        token_valid_s: Life of a join token.
    """

    heartbeat_s: float = Field(2.0, gt=0.05, le=60)
    token_valid_s: float = Field(24 * 3600.0, gt=0)

    @property
    def gone_s(self) -> float:
        """Silence after which a site counts as gone."""
        return 3 * self.heartbeat_s

    @property
    def grace_s(self) -> float:
        """How long a round with a quorum waits for a site that is gone."""
        return 5 * self.heartbeat_s


class TaskSource(Section):
    """A task that the orchestrator has too: for the first base and for plug-ins.

    Attributes:
        source: "path.py:Class" (relative to the home) or "module:Class".
        settings: The task's settings here.
    """

    source: str
    settings: dict[str, Any] = {}


class LedgerSection(Section):
    """Where the ledger is.

    Attributes:
        url: ``postgresql://…``; empty: the SQLite file in the home.
    """

    url: str = ""


class StoreSection(Section):
    """Where models and contributions are kept.

    Attributes:
        url: ``s3://BUCKET/PREFIX``, of this federation alone; empty: the folder in the home.
        endpoint: URL of an S3-compatible server; empty: AWS. Plain http is for this machine only.
        region: The bucket's; empty: AWS_REGION, or us-east-1.
        credentials: A file like ``~/.aws/credentials``, whose section ``default`` is taken; an
            absolute path. Empty: AWS_ACCESS_KEY_ID and its kin, or the machine's role.
        cache_bytes: How much of the bucket is kept as files on this machine.
    """

    url: str = Field("", pattern=r"^(s3://[^/\s?#]+(/[^\s?#]*)?)?$")
    endpoint: str = Field("", pattern=r"^(https?://[^\s?#]+)?$")
    region: str = ""
    credentials: str = Field("", pattern=r"^(/.*)?$")
    cache_bytes: int = Field(64 << 30, ge=0)

    @model_validator(mode="after")
    def _encrypted(self) -> StoreSection:
        host = urlsplit(self.endpoint).hostname
        if self.endpoint.startswith("http:") and host not in ("127.0.0.1", "::1", "localhost"):
            raise ValueError("endpoint must be https: models would travel in the clear")
        return self


class DaemonConfig(Section):
    """``farflung.toml``."""

    listen: ListenSection = ListenSection()
    gateways: GatewaysSection = GatewaysSection()
    dashboard: DashboardSection = DashboardSection()
    ray: RaySection = RaySection()
    plugins: PluginSection = PluginSection()
    retention: RetentionSection = RetentionSection()
    sites: SitesSection = SitesSection()
    ledger: LedgerSection = LedgerSection()
    store: StoreSection = StoreSection()
    tasks: dict[Name, TaskSource] = {}

    @property
    def gateways_bind(self) -> str:
        """host:port that the gateways share."""
        return self.gateways.bind or f"{self.listen.bind.rpartition(':')[0]}:8472"


def parse_run(text: str, where: str = "run.toml") -> RunConfig:
    """The run configuration of a TOML document.

    Raises:
        ConfigInvalid: Not TOML, or a key is missing, unknown or out of range.
    """
    return _parse(RunConfig, text, where)


def parse_daemon(text: str, where: str = "farflung.toml") -> DaemonConfig:
    """The daemon's configuration of a TOML document.

    Raises:
        ConfigInvalid: Not TOML, or a key is missing, unknown or out of range.
    """
    return _parse(DaemonConfig, text, where)


def _parse(model: type[Parsed], text: str, where: str) -> Parsed:
    try:
        return model.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigInvalid(f"{where}: not TOML: {error}", file=where) from None
    except ValidationError as error:
        raise ConfigInvalid(
            f"{where}: {first_problem(error)}", key=problem_key(error), file=where
        ) from None
