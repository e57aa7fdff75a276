"""A Ray cluster that somebody else runs: joined by its address, and checked before it is used.

Ray can't be closed off there: its nodes must reach each other, and whoever reaches it and has its
token runs code on it. So every node is asked what it listens on, whether it runs what we run, and
whether it sees the store. Nodes that come later are not checked.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import platform
import re
import secrets
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.compute import errors, listeners
from orchestrator.compute.config import ComputeConfig

_PACKAGES = ("farflung", "ray", "torch", "numpy")

REMEDY = (
    "It was not used. Let only the cluster's own nodes reach each of them (nft add rule inet filter "
    "input ip saddr != { NODES } tcp dport != { 22, ORCHESTRATOR_PORT } ct state new drop) and then"
)
"""What to do about a cluster, which can't be closed off from here."""


@dataclass(frozen=True)
class Cluster:
    """What was found.

    Attributes:
        nodes: Addresses of the nodes that live.
        cpus: Their CPUs, as Ray counts them.
        listeners: address:port of what Ray listens on, on all nodes.
    """

    nodes: list[str]
    cpus: int
    listeners: list[str]


def _ray() -> Any:  # most of what is used of it has no types
    import ray

    return ray


def join(config: ComputeConfig) -> str:
    """Connect to the cluster; gives the folder in which its sockets lie on this host.

    Raises:
        ComputeNotReady: It can't be reached, or this host is not one of its nodes.
    """
    ray = _ray()
    if not os.access(config.token_file, os.R_OK):
        raise errors.ComputeNotReady(
            f"[ray] token_file {config.token_file} can't be read: it must hold the token of the "
            f"cluster at {config.address}"
        )
    try:
        context = ray.init(address=config.address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise errors.ComputeNotReady(
            f"the Ray cluster at {config.address} can't be joined: {error}. This host must be one of "
            f"its nodes: `ray start --address={config.address} --num-cpus=0` with the same token"
        ) from error
    return str(Path(context.address_info["session_dir"]).parent)


def check(config: ComputeConfig, timeout_s: float) -> Cluster:
    """Ask every node what it is like.

    Raises:
        ComputeExposed: Ray can be reached from beyond loopback and ``private_networks``.
        ComputeNotReady: A node runs other versions, or does not see a folder that it must see.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray = _ray()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    task, marks = ray.remote(probe), _marks(config.shared)
    try:
        refs = [
            task.options(
                num_cpus=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
            ).remote([str(mark) for mark in marks])
            for node in nodes
        ]
        answers = ray.get(refs, timeout=timeout_s)
    finally:
        for mark in marks:
            mark.unlink(missing_ok=True)
    own = probe([])
    for node, answer in zip(nodes, answers, strict=True):
        _require_same(node["NodeManagerAddress"], own, answer)
        found = [
            listeners.Listener(ipaddress.ip_address(address), port, 0)
            for address, port in answer["listeners"]
        ]
        hosts = [ipaddress.ip_address(address) for address in answer["hosts"]]
        listeners.require_private(found, hosts, config.private_networks, REMEDY)
    return Cluster(
        nodes=[node["NodeManagerAddress"] for node in nodes],
        cpus=max(1, int(ray.cluster_resources().get("CPU", 1))),
        listeners=sorted({f"{host}:{port}" for a in answers for host, port in a["listeners"]}),
    )


def _marks(folders: tuple[str, ...]) -> list[Path]:
    marks = [Path(folder, f".ray-{secrets.token_hex(8)}") for folder in folders]
    for mark in marks:
        mark.touch()
    return marks


def _require_same(address: str, own: dict[str, Any], answer: dict[str, Any]) -> None:
    if answer["unseen"]:
        raise errors.ComputeNotReady(
            f"Ray node {address} does not see {', '.join(answer['unseen'])}: every node must have the "
            "orchestrator's home under the same path, on a file system that all of them share",
            node=address,
        )
    for name, ours in own["versions"].items():
        theirs = answer["versions"].get(name)
        if theirs != ours:
            raise errors.ComputeNotReady(
                f"Ray node {address} has {name} {theirs} where the orchestrator has {ours}: the same "
                "bits need the same versions and the same kind of processor everywhere",
                node=address,
            )


def probe(marks: list[str]) -> dict[str, Any]:
    """What a node is like; run as a task on it.

    Args:
        marks: Files that it should see.
    """
    import torch

    found = listeners.listening(_rays())
    return {
        "unseen": [str(Path(mark).parent) for mark in marks if not Path(mark).exists()],
        "versions": {
            **{name: version(name) for name in _PACKAGES},
            "Python": platform.python_version(),
            "processor": torch.backends.cpu.get_cpu_capability(),
        },
        "listeners": sorted((str(each.address), each.port) for each in found),
        "hosts": [str(address) for address in listeners.host_addresses()],
    }


def _rays() -> list[int]:
    """The processes of Ray on this node: those that name its session, and all below its raylet."""
    import psutil

    raylet = psutil.Process(os.getppid())
    pids = {os.getpid(), raylet.pid, *(p.pid for p in raylet.children(recursive=True))}
    match = re.search(r"session_[0-9_-]+", " ".join(raylet.cmdline()))
    for process in psutil.process_iter(["cmdline"]):
        if match and match[0] in " ".join(process.info["cmdline"] or ()):
            pids.add(process.pid)
    return sorted(pids)
