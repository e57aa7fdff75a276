"""NVIDIA FLARE: a provisioned server and clients as its POC mode makes them for one machine.

Transport (``http``, mutual TLS) and all settings are those of the provisioning. Two things differ:
the port is a free one instead of 8002, and start scripts run with their ``--once``, without the
shell loop that starts a process again. A round begins when its first site has the weights, so one
round more than asked for is run, to know when the last ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.peers.case import Case, Figures
from benchmarks.peers.deployment import Deployment
from benchmarks.peers.ruler import SERVER
from benchmarks.peers.ruler import measure as measured
from orchestrator.bench.trial import CONSTANT
from orchestrator.port import free_port
from protos.errors import ComputeFailed

JOB = Path(__file__).with_name("flare_job")
DEFAULT_PORT = "fed_learn_port: 8002"
READY_S = 120.0


def measure(case: Case) -> tuple[str, Figures]:
    """Its version and figures."""
    notes = case.folder / "rounds.jsonl"
    port = free_port()
    poc = case.folder / "poc"
    place = {"NVFLARE_POC_WORKSPACE": str(poc)}
    with Deployment(case.folder, case.environment) as deployment:
        version = deployment.version("nvflare")
        _provision(deployment, case, port, poc, place)
        kits = poc / "example_project" / "prod_00"

        def start(name: str) -> None:
            script = kits / name / "startup" / "sub_start.sh"
            deployment.start(name, ["/bin/bash", str(script), "--once"], place)

        start(SERVER)
        deployment.until(lambda: deployment.listening(port), "the server listens", READY_S)
        for name in case.names:
            start(name)
        deployment.until(
            lambda: all(
                "Successfully registered client" in (case.folder / f"{name}.log").read_text()
                for name in case.names
            ),
            "all sites are registered",
            READY_S,
        )

        def launch() -> None:
            deployment.run(
                [
                    *("python", "job.py", "--elements", str(case.elements)),
                    *("--rounds", str(case.rounds + 1), "--sites", str(case.sites)),
                    *("--constant", repr(CONSTANT), "--notes", str(notes)),
                    *("--out", str(case.folder / "jobs")),
                ],
                JOB,
                place,
            )
            job = str(case.folder / "jobs" / "round_trip")
            deployment.run(["nvflare", "job", "submit", "-j", job], variables=place)

        return version, measured(deployment, case, notes, launch)


def _provision(
    deployment: Deployment, case: Case, port: int, poc: Path, place: Mapping[str, str]
) -> None:
    """Make the start-up kits: as POC mode would, then again with the port in its project file."""
    prepare = ["nvflare", "poc", "prepare", "--force"]
    deployment.run([*prepare, "-n", str(case.sites)], variables=place)
    project = (poc / "project.yml").read_text()
    if DEFAULT_PORT not in project:
        raise ComputeFailed(f"the project file of POC mode has no {DEFAULT_PORT}")
    changed = case.folder / "project.yml"
    changed.write_text(project.replace(DEFAULT_PORT, f"fed_learn_port: {port}"))
    deployment.run([*prepare, "-i", str(changed)], variables=place)
