"""A trainer without its process: plans are performed in the test's."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from torch import Tensor

from protos.contribution import ASSESSMENTS, Header
from protos.manifest import Index, Manifest
from protos.plan import OptimizerChoice, Plan
from site_agent.pipe import Progress
from site_agent.trainer.exchange import Clock, Exchange
from site_agent.trainer.watch import Watch
from site_agent.trainer.workload import Workload
from strategies import registry
from tests.support import strategies_for_tests
from tests.support.sites import base_of, unpack, workload_of

EVERY = {**registry.catalogue(), **{cls.name: cls for cls in strategies_for_tests.ALL}}
"""The strategies that there are, and those for tests."""


class Bench:
    """Performs plans in this process, as the trainer does."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.told: list[Progress] = []
        self.work: Workload | None = None

    def perform(
        self,
        plan: Plan,
        state: Path | None = None,
        work: Workload | None = None,
        base: tuple[Path, Manifest, Index] | None = None,
        cancelled: threading.Event | None = None,
        enough_at: float | None = None,
    ) -> tuple[Header, dict[str, Tensor], Path]:
        self.count += 1
        self.work = work or workload_of(plan)
        out = self.folder / f"out-{self.count}"
        if plan.kind != "init":
            base = base or base_of(self.folder, plan)
            plan = plan.model_copy(update={"manifest": base[1].digest})
        finishing = threading.Event()

        def tell(progress: Progress) -> None:
            self.told.append(progress)
            if enough_at is not None and progress.done >= enough_at:
                finishing.set()

        watch = Watch(1, tell, cancelled, finishing)
        exchange = Exchange(self.work, plan, watch, Clock(), base[0] if base else None, state, out)
        header, index = exchange.perform()
        assert Header.decode(header.encode()) == header
        assert header.index == index.digest
        assert (out / "payload").stat().st_size == index.nbytes
        covered = self.work.shared.covering(plan.groups)
        if plan.kind in ASSESSMENTS:
            covered = Manifest(())
        assert header.expected_nbytes(covered) == index.nbytes
        if header.codec:
            return header, {}, out
        return header, unpack(header, covered, out / "payload"), out


def sgd(**fields: Any) -> OptimizerChoice:
    return OptimizerChoice.model_validate({"name": "sgd", "momentum": 0.0, **fields})
