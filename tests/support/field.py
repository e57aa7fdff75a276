"""A federation on the field: three sites whose faults a test can switch on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.faulty import FaultyFederation

BLOBS = f"{Path(__file__).parent / 'blobs.py'}:Blobs"
SITES = ("north", "south", "east")
ORCHESTRATOR = "orchestrator"


class Field:
    """A federation whose sites have switches.

    Args:
        root: An empty folder.
        daemon: Further sections of farflung.toml.
        policy: ``[policy]`` of every site.
        environment: Variables of all processes, on top of this one's.
        trainer: Further keys of ``[trainer]`` of every site.
        kind: Of federation.
        faults: What `FaultyFederation` takes beside.
        kind: Class of its federation.
    """

    def __init__(
        self,
        root: Path,
        daemon: dict[str, Any] | None = None,
        policy: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        trainer: dict[str, Any] | None = None,
        kind: type[FaultyFederation] = FaultyFederation,
        **faults: Any,
    ) -> None:
        self.switches = {name: root / "switches" / name for name in (*SITES, ORCHESTRATOR)}
        for folder in self.switches.values():
            folder.mkdir(parents=True)
        self.federation = kind(
            root,
            {
                site: {
                    "tasks": {
                        "blobs": {
                            "source": BLOBS,
                            "settings": {"part": i, "switches": str(self.switches[site])},
                        }
                    },
                    "trainer": {"memory_bytes": 2 << 30, "threads": 1, **(trainer or {})},
                    "policy": policy or {},
                }
                for i, site in enumerate(SITES)
            },
            orchestrator_tasks={
                "blobs": {
                    "source": BLOBS,
                    "settings": {"switches": str(self.switches[ORCHESTRATOR])},
                }
            },
            daemon={"sites": {"heartbeat_s": 0.3}, **(daemon or {})},
            environment=environment,
            **faults,
        )

    def config(self, name: str, **changes: Any) -> dict[str, Any]:
        """A run of two rounds in which two of three sites suffice; ``changes`` replace keys."""
        return {
            "name": name,
            "rounds": 2,
            "task": {"name": "blobs"},
            "cohort": {"quorum": 2, "deadline_s": 120},
            "local": {"work": {"epochs": 2}, "batch_size": 20, "lr": 0.1},
            "strategy": [],
            **changes,
        }

    def clear(self) -> None:
        """Switch every fault off and forget the steps."""
        for folder in self.switches.values():
            for file in folder.iterdir():
                file.unlink()

    def steps(self, site: str) -> int:
        """Training steps that a site has made since the switches were cleared."""
        file = self.switches[site] / "steps"
        return len(file.read_text().splitlines()) if file.exists() else 0
