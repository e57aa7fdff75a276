"""From `[ray]` in the daemon's configuration to what its compute process is started with."""

from __future__ import annotations

import os
from typing import Any

from orchestrator.arithmetic import FUNCTIONS
from orchestrator.compute import ComputeConfig
from orchestrator.config import RaySection
from orchestrator.home import Home


def compute_config(home: Home, ray: RaySection) -> ComputeConfig:
    """What the compute process of a home may do."""
    return ComputeConfig(
        num_cpus=ray.cpus or max(1, (os.cpu_count() or 2) - 1),
        object_store_memory_bytes=ray.object_store_bytes,
        functions=FUNCTIONS,
        preload=("orchestrator.arithmetic.preload",),
        hidden=(str(home.keys), str(home.run)),
        private_networks=ray.private_networks,
        plugins_may_reach_keys=ray.plugins_may_reach_keys,
        address=ray.address,
        token_file=ray.token_file,
        shared=(str(home.store), str(home.work)) if ray.address else (),
    )


def described(facts: dict[str, Any]) -> str:
    """Facts of a compute process in words; empty if it has not come up."""
    if facts.get("address"):
        return f"Ray {facts['ray']}, {len(facts['nodes'])} nodes at {facts['address']}"
    level = facts.get("level")
    return f"Ray {facts.get('ray', '')}, confined by {level}" if level else ""
