"""What a site says of itself when it attaches; known without importing any of what it runs."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from protos import __version__
from protos.v1 import site_pb2
from site_agent.link.stream import PROTOCOL
from site_agent.task_source import TaskSource

INSTANCE = secrets.token_hex(8)
"""Of this process: by it the orchestrator tells two agents with the same keys apart."""


def package_versions() -> dict[str, str]:
    """Versions of what the site runs."""
    out = {"python": platform.python_version(), "farflung": __version__}
    for name in ("torch", "numpy", "grpcio", "protobuf"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "not installed"
    return out


def device_kind(known: str) -> str:
    """What the trainer or site.toml said, without a number; for "auto", what the driver tells."""
    if known == "auto":
        known = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    return known.split(":", 1)[0]


def hello_of(
    sources: Mapping[str, TaskSource], plans: Sequence[str], paused: bool, device: str
) -> site_pb2.Hello:
    """The first message of a stream.

    Args:
        sources: Where each task's code is.
        plans: Those in work, and those whose contribution waits to be sent.
        paused: Whether the site takes no new plans.
        device: "cpu" or "cuda".
    """
    packages = package_versions()
    return site_pb2.Hello(
        version=packages["farflung"],
        protocol=PROTOCOL,
        packages=packages,
        tasks=[
            site_pb2.TaskOffer(name=name, digest=source.digest)
            for name, source in sorted(sources.items())
        ],
        plans=plans,
        paused=paused,
        device=device,
        instance=INSTANCE,
    )
