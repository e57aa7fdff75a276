"""What control feels while a model and a contribution fill a narrow line; prints one document of JSON.

    unshare -Urn python -m tests.support.saturated FOLDER --mbit 2 --queue-s 0.4 --model-mb 5

With ``--daemon`` the orchestrator is a real one with a run of one round, else it is the tests' tiny one.
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

from orchestrator.bench import weights
from orchestrator.child import Child
from orchestrator.federation import Federation
from protos.plan import Plan, Work
from protos.v1 import site_pb2
from site_agent.cli.ring import ring
from site_agent.home import Home
from tests.support.narrow import DAEMON_HOST, Narrow
from tests.support.sites import RunningAgent, base_of, plan_of, site_command, write_config
from tests.support.tiny_orchestrator import TinyOrchestrator

BYTES_A_UNIT = 44
"""Bytes of the model of the task Clouds for each of its hidden units."""
EVERY_S = 0.5
NARROW = "bulk leaves room on a narrow line"


def main() -> None:
    asked = argparse.ArgumentParser()
    asked.add_argument("folder", type=Path)
    asked.add_argument("--mbit", type=float, default=2.0)
    asked.add_argument("--queue-s", type=float, default=0.4)
    asked.add_argument("--model-mb", type=float, default=5.0)
    asked.add_argument("--congestion", default="reno")
    asked.add_argument("--daemon", action="store_true")
    said = asked.parse_args()
    with Narrow(said.mbit, said.queue_s, said.congestion) as line:
        look = federate if said.daemon else measure
        print(json.dumps(look(said.folder, line, said.model_mb * 1e6)))


def measure(folder: Path, line: Narrow, model_bytes: float) -> dict[str, Any]:
    """One plan from the first byte of its base to the last of its contribution."""
    orchestrator = TinyOrchestrator(folder / "orchestrator", host=DAEMON_HOST, beat_s=2.0)
    orchestrator.start()
    home = folder / "north"
    write_config(home, ("Clouds",), "[trainer]\nthreads = 1\n")
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
            "narrow": [e["way"] for e in agent.events() if e["event"] == NARROW],
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


class Distant(Federation):
    """A federation whose sites are at the other end of a line."""

    def __init__(self, line: Narrow, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._line = line

    def _site_command(self, site: str, *words: str) -> Child:
        command = [*self._line.at_site(), *site_command(words[0])]
        return self._start(site, [*command, "--home", str(self.folder(site)), *words[1:]])


def federate(folder: Path, line: Narrow, model_bytes: float) -> dict[str, Any]:
    """One round of a real daemon: a first base up, the same down, a contribution up."""
    source = f"{Path(weights.__file__)}:Weights"
    site = {"tasks": {"weights": {"source": source}}, "trainer": {"threads": 1}}
    elements = int(model_bytes / 4 / weights.TENSORS)
    run = {
        "name": "narrow", "rounds": 1, "init": {"from": "site:north"}, "assess": {"every": 0},
        "task": {"name": "weights", "params": {"elements": elements}}, "strategy": [],
        "cohort": {"sites": ["north"], "quorum": "all", "deadline_s": 3600.0},
        "local": {"work": {"steps": 1}, "batch_size": 1, "lr": 1.0},
    }  # fmt: skip
    daemon = {"listen": {"bind": f"{DAEMON_HOST}:8470"}}
    with Distant(line, folder, {"north": site}, daemon=daemon, dashboard=False) as federation:
        home = Home(federation.folder("north"))
        round_trips, ended = [], Event()

        def poll() -> None:
            while not ended.wait(EVERY_S):
                found = ring(home, "status")
                if found["round_trip_s"] is not None:
                    round_trips.append(("any", found["round_trip_s"]))

        poller = Thread(target=poll, daemon=True)
        poller.start()
        began = monotonic()
        last = federation.wait(federation.launch(run), 3600)
        seconds = monotonic() - began
        ended.set()
        poller.join(30)
        log = [json.loads(text) for text in home.agent_log.read_text().splitlines()]
        said = (federation.home.log / "daemon.jsonl").read_text()
        return {
            "seconds": seconds,
            "model_bytes": elements * 4 * weights.TENSORS,
            "round_trips": round_trips,
            "state": last.state,
            "attached": sum(e["event"] == "attached" for e in log),
            "silent": said.count("has been silent"),
            "narrow": [e["way"] for e in log if e["event"] == NARROW],
            "queues": line.statistics(),
        }


if __name__ == "__main__":
    main()
