"""How the compute process is started, and what one plug-in may use."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self


class Level(enum.StrEnum):
    """How far a process could be closed off, the most closed first."""

    NAMESPACES = "namespaces"
    """Own network, mounts and process ids: nothing outlives it and nobody reaches it."""
    NETWORK = "network"
    """Own network and mounts; for hosts on which /proc can't be mounted."""
    MOUNTS = "mounts"
    """Own mounts, on the host's network: the keys are out of reach, others are not kept out."""
    NONE = "none"
    """The host grants no namespaces."""


CONFINED = (Level.NAMESPACES, Level.NETWORK, Level.NONE)
"""What is tried for a Ray of the daemon's own, and for plug-ins: never one's files with a network."""


@dataclass(frozen=True)
class Limits:
    """What one isolated plug-in may use.

    Attributes:
        seconds: Wall time, from the start of its process; > 0.
        memory_bytes: Private memory of its whole process tree. Files that are mapped shared or
            read-only don't count, so a memory-mapped model is free. torch alone needs 192 MiB.
        threads: Threads of torch and of the BLAS libraries.
        result_bytes: The largest JSON result.
    """

    seconds: float
    memory_bytes: int
    threads: int = 1
    result_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and self.memory_bytes > 0 and self.threads > 0):
            raise ValueError(f"limits must be positive: {self}")


@dataclass(frozen=True)
class ComputeConfig:
    """What the daemon decides about its compute process; nothing of it can change later.

    Attributes:
        num_cpus: Ray's CPUs: so many tasks run at once, the others queue.
        num_gpus: Ray's GPUs.
        object_store_memory_bytes: Ray's shared memory. No weights pass through it; Ray's own
            minimum, 75 MiB, is enough.
        functions: Name → "module:function": the whole of what requests may run; a request can't
            name code, only a row of this table. A function takes
            a dict and returns a dict, both JSON.
        preload: Modules that the worker which stays imports once Ray is up (torch takes a second), and
            zygotes before they fork.
        hidden: Folders that nothing in here may read: the keys, and the folder with the
            operator's socket. They must exist.
        private_networks: Networks in CIDR form on whose addresses Ray may listen where it can't be
            confined; ``0.0.0.0/0`` and ``::/0`` consent to all.
        plugins_may_reach_keys: Run plug-ins even on a host that grants no namespaces.
        levels: What to try, in this order.
        address: HOST:PORT of the head of a Ray cluster to use; empty: a Ray of its own. This host
            must be one of its nodes.
        token_file: Holds the cluster's authentication token.
        shared: Folders that every node of a cluster must see.
        ray_environment: Variables that are set for Ray on top of ours.
    """

    num_cpus: int = 2
    num_gpus: int = 0
    object_store_memory_bytes: int = 80 * 2**20
    functions: Mapping[str, str] = field(default_factory=dict)
    preload: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    private_networks: tuple[str, ...] = ()
    plugins_may_reach_keys: bool = False
    levels: tuple[Level, ...] = CONFINED
    address: str = ""
    token_file: str = ""
    shared: tuple[str, ...] = ()
    ray_environment: Mapping[str, str] = field(default_factory=dict)
    temp_dir: str = ""
    """Ray's folder. The client sets it: short (a socket's path has at most 107 bytes), private."""

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels must name at least one level")
        if relative := [path for path in self.hidden if not path.startswith("/")]:
            raise ValueError(f"hidden folders must be absolute: {relative}")
        if any(Path(self.token_file).is_relative_to(folder) for folder in self.hidden):
            raise ValueError(f"the token file {self.token_file} lies in a hidden folder")

    def to_json(self) -> str:
        """One line, for the command line of the process."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of :meth:`to_json`."""
        data: dict[str, Any] = json.loads(text)
        for name in ("preload", "hidden", "private_networks", "shared"):
            data[name] = tuple(data[name])
        data["levels"] = tuple(Level(level) for level in data["levels"])
        return cls(**data)

    def at(self, temp_dir: str) -> Self:
        """The same, with Ray's folder."""
        return replace(self, temp_dir=temp_dir)
