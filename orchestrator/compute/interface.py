"""What the daemon sees of compute, whatever stands behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

from orchestrator.compute.config import Limits


class Compute(ABC):
    """Runs functions of a fixed table over JSON arguments; safe to use from many threads."""

    @abstractmethod
    def start(self) -> None:
        """Begins to start; returns at once."""

    @abstractmethod
    def wait_ready(self, timeout_s: float) -> dict[str, Any]:
        """Waits until requests are served.

        Returns:
            Facts: engine, level of confinement, whether keys are hidden, listeners, start time.

        Raises:
            ComputeNotReady: Not in time, or never (``ComputeExposed``); the reason is in it.
        """

    @abstractmethod
    def call(self, op: str, args: dict[str, Any], timeout_s: float) -> Any:
        """Does one operation, waiting for a start in progress within the same time.

        Raises:
            ComputeFailed: One of the classes in ``orchestrator.compute.errors``.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ends everything that was started; nothing of it is left when this returns."""

    def map(
        self, function: str, items: Sequence[dict[str, Any]], timeout_s: float
    ) -> list[dict[str, Any]]:
        """Runs a pure function of the table over every item, in parallel.

        A function may run twice for one item (its worker died), so what it writes must not
        depend on being alone: files under names of this attempt.

        Returns:
            The results in the order of the items.

        Raises:
            FunctionFailed: It raised; the facts name the first such item and the line.
            ComputeTimedOut: Not all done in time; the rest was cancelled.
            ComputeDied: The compute process, or a worker twice, ended under it. Call again.
        """
        args = {"function": function, "items": list(items)}
        values: list[dict[str, Any]] = self.call("map", args, timeout_s)
        return values

    def isolated(
        self,
        function: str,
        args: dict[str, Any],
        limits: Limits,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Runs one plug-in function in a fresh process without network, keys or environment.

        Args:
            function: A name of the table.
            args: JSON; large data as paths of files.
            limits: What it may use.
            timeout_s: Including the wait for a free CPU; default: its seconds plus a minute.

        Raises:
            PluginFailed: By cause: raised, killed, out of memory, timed out, not isolated.
        """
        request = {"function": function, "args": args, "limits": asdict(limits)}
        bound = limits.seconds + 60.0 if timeout_s is None else timeout_s
        value: dict[str, Any] = self.call("isolated", request, bound)
        return value

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
