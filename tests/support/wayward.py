"""A third party's strategies that do at the orchestrator what they should not."""

from __future__ import annotations

import socket
from pathlib import Path

import torch

from strategies.calibration.temperature import Temperature
from strategies.context import Calibration, Refinement, Tensors
from strategies.protocol import Strategy


class Wayward(Temperature):
    """Test: sends what temperature sends, and goes wrong where its map is fitted.

    Attributes:
        fault: raise, loop, memory, "connect HOST:PORT" or "read PATH"; empty: none.
    """

    name = "test_wayward"
    summary = "Test: a map that is not fitted."

    fault: str = ""

    def calibrate(self, sums: Tensors) -> Calibration | None:
        """As temperature, or not."""
        what, _, argument = self.fault.partition(" ")
        if what == "raise":
            raise ValueError("no root in the bracket")
        if what == "memory":
            hoard = [bytearray(64 << 20) for _ in range(10_000)]
            del hoard
        if what == "connect":
            host, _, port = argument.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        if what == "read":
            Path(argument).read_bytes()
        while what == "loop":
            pass
        return super().calibrate(sums)


class Spoiler(Strategy):
    """Test: a plug-in that forgets everything."""

    name = "test_spoiler"
    family = "distillation"
    summary = "Test: a model without weights."

    def refine(self, refinement: Refinement) -> dict[str, float]:
        """Set all weights to zero."""
        with torch.no_grad():
            for parameter in refinement.model.parameters():
                parameter.zero_()
        return {}


def install(folder: Path) -> str:
    """Make a folder in which Python finds them as those of an installed package; gives it."""
    metadata = folder / "farflung_wayward-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: farflung-wayward\nVersion: 1\n"
    )
    (metadata / "entry_points.txt").write_text(
        f"[farflung.strategies]\n{Wayward.name} = {__name__}:Wayward\n"
        f"{Spoiler.name} = {__name__}:Spoiler\n"
    )
    return str(folder)
