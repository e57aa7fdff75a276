"""What may leave a site besides weights: every text and every metric passes here, and is noted.

By default an error leaves as its class, file and line: its message may quote data. Messages that
Farflung itself wrote about tensors, keys and versions leave as they are. What left stands in
``sent.log``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from protos.errors import FarflungError
from protos.v1 import site_pb2
from site_agent.config import PolicySection
from site_agent.link.journal import LineFile
from site_agent.pipe import Failed

MAX_TEXT = 1000


class Disclosure:
    """The site's policy on texts and metrics.

    Args:
        site: Name of the site.
        policy: [policy] of site.toml.
        log: File that lists what left.
    """

    def __init__(self, site: str, policy: PolicySection, log: Path) -> None:
        self._site, self._policy, self._log = site, policy, LineFile(log)

    def apply(self, policy: PolicySection) -> None:
        """Another policy counts from now on."""
        self._policy = policy

    def failure(self, failed: Failed) -> str:
        """What is said of an exception in the trainer."""
        if failed.ours:
            return self._cut(self._named(failed.message))
        what = f"{failed.cause}: {failed.system}" if failed.system else failed.cause
        what = f"{what} at {failed.where}" if failed.where else what
        if failed.shared_memory:
            text = (
                f"the task ran out of shared memory ({what}): /dev/shm is too small for "
                "trainer.loader_workers; make it larger (containers: --shm-size) or have fewer"
            )
        elif failed.out_of_memory:
            text = f"the task ran out of memory ({what})"
        elif failed.device_lost:
            text = f"the device failed ({what}); the next plan gets a new trainer"
        else:
            text = f"the task failed: {what}"
        if self._policy.error_text == "full" and failed.message:
            text += f": {failed.message}"
        return self._cut(self._named(text))

    def own(self, error: FarflungError) -> str:
        """What is said of an error that the link found: it knows no data."""
        return self._cut(self._named(error.message))

    def metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics that may leave."""
        return {
            name: value
            for name, value in metrics.items()
            if math.isfinite(value) and self._allowed(name)
        }

    def loss(self, loss: float | None) -> float:
        """The running loss of a progress message; NaN where the policy hides it."""
        if loss is None or not math.isfinite(loss) or not self._allowed("train_loss"):
            return math.nan
        return loss

    def hello(self, hello: site_pb2.Hello) -> None:
        """Note what the site says of itself when it attaches."""
        self.sent(
            "hello",
            packages=dict(hello.packages),
            tasks={task.name: task.digest for task in hello.tasks},
            plans=list(hello.plans),
            device=hello.device,
            instance=hello.instance,
        )

    def progress(self, progress: site_pb2.Progress) -> None:
        """Note that a plan was told to be in another state, or to wait for a window."""
        loss = progress.loss if math.isfinite(progress.loss) else None
        state = site_pb2.Progress.State.Name(progress.state).lower()
        waits = progress.waits_until or None
        self.sent(
            "progress", plan=progress.plan_id, state=state, train_loss=loss, waits_until=waits
        )

    def sent(self, kind: str, **content: Any) -> None:
        """Note what left."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._log.write({"time": now, "sent": kind, **content})

    def _allowed(self, name: str) -> bool:
        allowed = self._policy.metrics
        return allowed == "all" or any(fnmatchcase(name, pattern) for pattern in allowed)

    def _named(self, text: str) -> str:
        start = f"site {self._site}"
        return text if text.startswith(start) else f"{start}: {text}"

    def _cut(self, text: str) -> str:
        return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + " …"
