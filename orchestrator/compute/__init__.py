"""The compute process: Ray, closed off, and the only package that imports it.

    daemon ── ComputeClient ──pipes──▶ python -m orchestrator.compute
                                         supervisor: namespaces, nothing outlives it
                                         └─ driver: Ray, a table of operations
                                            └─ workers: functions of a fixed table
                                               └─ zygote: has imported torch, forks
                                                  └─ sandbox: one plug-in, limits, no network

The daemon imports neither Ray nor torch. Who needs an answer calls ``map`` (pure functions over
JSON arguments that name files) or ``isolated`` (one plug-in in a process of its own);
``InProcessCompute`` does the same without Ray and is the oracle in tests.
"""

from orchestrator.compute.client import ComputeClient
from orchestrator.compute.config import ComputeConfig, Level, Limits
from orchestrator.compute.inprocess import InProcessCompute
from orchestrator.compute.interface import Compute

__all__ = ["Compute", "ComputeClient", "ComputeConfig", "InProcessCompute", "Level", "Limits"]
