"""The twin without Ray: the same operations in the calling process, one after another."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.compute import errors, ops
from orchestrator.compute.config import ComputeConfig, Limits
from orchestrator.compute.functions import run_function
from orchestrator.compute.interface import Compute
from orchestrator.compute.sandbox import Cell, run_isolated


class LocalEngine:
    """Runs functions where it is called."""

    def __init__(self, config: ComputeConfig) -> None:
        self.functions = config.functions
        self._cell = Cell(
            config.hidden, config.levels, config.plugins_may_reach_keys, config.preload
        )

    def facts(self) -> dict[str, Any]:
        """How it runs."""
        return {"engine": "in-process", "num_cpus": 1}

    def map(self, spec: str, texts: list[str], timeout_s: float) -> list[str]:
        """One after another; the time is checked between items."""
        deadline = time.monotonic() + timeout_s
        answers: list[str] = []
        for text in texts:
            if time.monotonic() > deadline:
                message = f"not done after {timeout_s:g} s: {len(answers)} of {len(texts)} items"
                raise errors.ComputeTimedOut(message, seconds=timeout_s, tasks=len(texts))
            answers.append(run_function(spec, text))
        return answers

    def isolated(self, spec: str, text: str, limits: Limits, timeout_s: float) -> dict[str, Any]:
        """The same process of its own as under Ray."""
        del timeout_s  # nothing queues here: the plug-in's own limit is the bound
        return run_isolated(spec, text, limits, self._cell)


class InProcessCompute(Compute):
    """The interface of ``ComputeClient`` without another process: the oracle in tests."""

    def __init__(self, config: ComputeConfig | None = None) -> None:
        self._engine = LocalEngine(config or ComputeConfig())

    def start(self) -> None:
        """Nothing to do."""

    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """Ready at once."""
        del timeout_s
        return self._engine.facts()

    def call(self, op: str, args: dict[str, Any], timeout_s: float) -> Any:
        """Does one operation here."""
        return ops.perform(self._engine, op, args, timeout_s)

    def stop(self) -> None:
        """Nothing to do."""
