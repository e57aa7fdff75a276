"""Configuration of the daemon: ``farflung.toml`` in its home.

TOML in, frozen values out. Unknown keys are refused; every error names the file and the key's path.
What a run is configured with stands in `run_config`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protos.errors import ConfigInvalid
from protos.plan import Name, first_problem, problem_key

DEFAULT_HOME = Path("~/.farflung")

Count = Annotated[int, Field(ge=0)]

Parsed = TypeVar("Parsed", bound="Section")


class Section(BaseModel):
    """Base: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


def parse_daemon(text: str, where: str = "farflung.toml") -> DaemonConfig:
    """The daemon's configuration of a TOML document.

    Raises:
        ConfigInvalid: Not TOML, or a key is missing, unknown or out of range.
    """
    return parse(DaemonConfig, text, where)


def parse(model: type[Parsed], text: str, where: str) -> Parsed:
    """The configuration of a TOML document.

    Raises:
        ConfigInvalid: Not TOML, or a key is missing, unknown or out of range.
    """
    try:
        return model.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigInvalid(f"{where}: not TOML: {error}", file=where) from None
    except ValidationError as error:
        raise ConfigInvalid(
            f"{where}: {first_problem(error)}", key=problem_key(error), file=where
        ) from None
