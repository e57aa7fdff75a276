"""Flower: a SuperLink and a SuperNode for each site, as its guide deploys them on one machine.

The guide's ``--insecure`` is kept, so there is no TLS. Evaluation, which would send the model down
a second time in every round, is off, and so is the installation of an app's dependencies when it
starts. All else is as it comes.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.case import Case, Figures
from benchmarks.peers.deployment import Deployment
from benchmarks.peers.ruler import RUN_S, SERVER
from benchmarks.peers.ruler import measure as measured
from orchestrator.bench.trial import CONSTANT
from orchestrator.port import free_port

APP = Path(__file__).with_name("flower_app")
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
READY_S = 120.0


def measure(case: Case) -> tuple[str, Figures]:
    """Its version and figures."""
    notes = case.folder / "rounds.jsonl"
    port = free_port()

    def variables(name: str) -> dict[str, str]:
        home = case.folder / "flwr" / name
        home.mkdir(parents=True, exist_ok=True)
        return {**QUIET, "FLWR_HOME": str(home)}

    with Deployment(case.folder, case.environment) as deployment:
        version = deployment.version("flwr")
        deployment.start(
            SERVER,
            [
                *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)),
                "--disable-runtime-dependency-installation",  # it would ask a package index
            ],
            variables(SERVER),
        )
        deployment.until(lambda: deployment.listening(port), "the SuperLink listens", READY_S)
        for number, name in enumerate(case.names):
            deployment.start(
                name,
                [
                    *("flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"),
                    *("--port", str(free_port())),
                    *("--node-config", f"constant={(number + 1) * CONSTANT!r}"),
                ],
                variables(name),
            )
        operator = variables("operator")
        (Path(operator["FLWR_HOME"]) / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n\n[superlink.here]\n'
            f'address = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        settings = (
            f"elements={case.elements} rounds={case.rounds} sites={case.sites} "
            f'notes="{notes}" timeout={RUN_S!r}'
        )
        launch = ["flwr", "run", str(APP), "here", "-c", settings]
        return version, measured(
            deployment, case, notes, lambda: deployment.run(launch, variables=operator)
        )
