"""What control feels while a model and a contribution fill a narrow line; prints one document of JSON.

unshare -Urn python -m tests.support.saturated FOLDER --mbit 2 --queue-s 0.4 --model-mb 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
from itertools import pairwise
from pathlib import Path
from threading import Event, Thread
from time import monotonic
from typing import Any

from protos.plan import Plan, Work
from protos.v1 import site_pb2
from tests.support.narrow import DAEMON_HOST, Narrow
from tests.support.sites import RunningAgent, base_of, plan_of, site_command, write_config
from tests.support.tiny_orchestrator import TinyOrchestrator

BYTES_A_UNIT = 44
"""Bytes of the model of the task Clouds for each of its hidden units."""
EVERY_S = 0.5


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("folder", type=Path)
    asked.add_argument("--mbit", type=float, default=2.0)
    asked.add_argument("--queue-s", type=float, default=0.4)
    asked.add_argument("--model-mb", type=float, default=5.0)
    asked.add_argument("--congestion", default="reno")
    asked.add_argument("--site-toml", default="")
    said = asked.parse_args()
    with Narrow(said.mbit, said.queue_s, said.congestion) as line:
        print(json.dumps(measure(said.folder, line, said.model_mb * 1e6, said.site_toml)))


def measure(folder: Path, line: Narrow, model_bytes: float, more: str) -> dict[str, Any]:
    """One plan from the first byte of its base to the last of its contribution."""
    orchestrator = TinyOrchestrator(folder / "orchestrator", host=DAEMON_HOST, beat_s=2.0)
    orchestrator.start()
    home = folder / "north"
    write_config(home, ("Clouds",), "[trainer]\nthreads = 1\n" + more)
    join = site_command("join", orchestrator.invite("north"), "--home", str(home))
    subprocess.run([*line.at_site(), *join], check=True, capture_output=True)
    agent = RunningAgent(home, line.at_site())
    try:
        orchestrator.attached()
        plan = plan_of(work=Work(steps=1), params={"hidden": int(model_bytes / BYTES_A_UNIT)})
        path, manifest, index = base_of(folder, plan)
        base = orchestrator.publish(path, manifest, index)
        plan = plan.model_copy(update={"base": base, "manifest": manifest.digest})
        probe = Probe(orchestrator, plan)
        began = monotonic()
        probe.start()
        orchestrator.offer(plan)
        while not orchestrator.contributions and monotonic() - began < 3600:
            probe.ended.wait(EVERY_S)
        probe.ended.set()
        probe.join(30)
        beats = [t for t, m in orchestrator.heard if m.WhichOneof("kind") == "heartbeat"]
        return {
            "seconds": monotonic() - began,
            "model_bytes": index.nbytes,
            "round_trips": probe.round_trips,
            "attached": len(orchestrator.streams),
            "fetches": len(orchestrator.fetches),
            "uploads": len(orchestrator.uploads),
            "came": bool(orchestrator.contributions),
            "longest_silence_s": max(b - a for a, b in pairwise(beats)),
            "queues": line.statistics(),
        }
    finally:
        agent.stop()
        orchestrator.stop()


class Probe(Thread):
    """Pushes a plan that the site has to refuse, and waits for it to say so, again and again."""

    def __init__(self, orchestrator: TinyOrchestrator, plan: Plan) -> None:
        super().__init__(daemon=True)
        self._orchestrator, self._plan = orchestrator, plan
        self.ended = Event()
        self.round_trips: list[tuple[str, float]] = []

    def run(self) -> None:
        number, orchestrator = 0, self._orchestrator
        while not self.ended.wait(EVERY_S):
            number += 1
            task = self._plan.task.model_copy(update={"name": "nobody_has_it"})
            plan = self._plan.model_copy(update={"run": f"probe{number}", "task": task})
            pushed = monotonic()
            orchestrator.offer(plan)
            orchestrator.outcome(plan)
            self.round_trips.append((self._phase(), monotonic() - pushed))

    def _phase(self) -> str:
        """Where the plan that fills the line is."""
        said = [m.progress for m in self._orchestrator.said if m.HasField("progress")]
        states = [p.state for p in said if p.plan_id == self._plan.id]
        return site_pb2.Progress.State.Name(states[-1]).lower() if states else "waiting"


if __name__ == "__main__":
    main()
