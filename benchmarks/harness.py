"""A federation of real processes for measurements: one folder, many runs, Ray started once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from orchestrator import views
from orchestrator.federation import Federation as Processes
from protos.errors import ComputeFailed

RUN_S = 1800.0


class RunResult(NamedTuple):
    """What a run came to.

    Attributes:
        rounds: Its rounds.
        scores: The pooled scores of the last one ("test.accuracy", "test_calibrated.ece", …).
        wire_bytes: Payload over the wire, both ways.
        seconds: Wall seconds from its start to its end.
    """

    rounds: Sequence[views.Round]
    scores: Mapping[str, float]
    wire_bytes: int
    seconds: float

    @property
    def epochs(self) -> float:
        """Local epochs of each site, all rounds together."""
        return sum(r.work.get("epochs", 0.0) for r in self.rounds)


class Federation:
    """A daemon and its sites in a temporary folder, gone afterwards.

    Args:
        sites: Names.
        tasks: Task name to its source; the orchestrator has them too.
        settings: Settings of the tasks by site.
        daemon: Sections of ``farflung.toml``.
        policy: Keys of [policy] at all sites.
    """

    def __init__(
        self,
        sites: Sequence[str],
        tasks: Mapping[str, str],
        settings: Mapping[str, Mapping[str, Any]],
        daemon: Mapping[str, Any] | None = None,
        policy: Mapping[str, Any] | None = None,
    ) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="farflung-"))
        tables = {
            site: {
                "site": {"device": "cpu"},
                "trainer": {"threads": 1},
                "policy": dict(policy or {}),
                "tasks": {
                    name: {"source": source, "settings": dict(settings.get(site, {}))}
                    for name, source in tasks.items()
                },
            }
            for site in sites
        }
        self.processes = Processes(
            self._root,
            tables,
            orchestrator_tasks={name: {"source": source} for name, source in tasks.items()},
            daemon=daemon,
            dashboard=False,
        )

    def __enter__(self) -> Federation:
        self.processes.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.processes.__exit__(kind, error, trace)
        shutil.rmtree(self._root, ignore_errors=True)

    def run(self, config: Mapping[str, Any]) -> RunResult:
        """Launch a run and wait for its end.

        Raises:
            ComputeFailed: It did not finish, or a round went without a site; says which.
        """
        view = self.processes.run(config, RUN_S)
        rounds = self.processes.rounds(view.id)
        if view.state != "finished":
            raise ComputeFailed(f"run {view.name} is {view.state}: {view.reason}")
        for entry in rounds:
            if entry.missing:
                raise ComputeFailed(f"run {view.name}, round {entry.round}: {entry.missing}")
        seconds = (view.ended or 0.0) - (view.started or 0.0)
        return RunResult(rounds, rounds[-1].scores, view.wire_bytes, seconds)
