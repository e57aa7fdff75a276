"""What is asked of each system, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from orchestrator.bench.trial import CONSTANT
from orchestrator.bench.weights import TENSORS


class Case(NamedTuple):
    """One size for one system.

    Attributes:
        sites: At least 2.
        model_bytes: 20 equal tensors of float32 in all.
        rounds: At least 2; the first is left out.
        folder: Empty, for everything that the system writes.
        environment: The peer's virtual environment.
    """

    sites: int
    model_bytes: int
    rounds: int
    folder: Path
    environment: Path

    @property
    def names(self) -> list[str]:
        """The sites' names, of which site i adds (i + 1) times `CONSTANT`."""
        return [f"site-{number + 1}" for number in range(self.sites)]

    @property
    def elements(self) -> int:
        """Of each tensor."""
        return max(1, round(self.model_bytes / (4 * TENSORS)))

    @property
    def step(self) -> float:
        """By how much every value of the average rises in a round."""
        return CONSTANT * (self.sites + 1) / 2


class Figures(NamedTuple):
    """What one case came to.

    Attributes:
        wall_s: From the beginning of a round to that of the next, without the first round.
        cpu_s: Processor seconds of all processes of the system meanwhile.
        foreign_cores: Processors that everything else kept busy meanwhile, median over the rounds.
        server_peak_rss_bytes: Resident memory of the server's process trees; Farflung's daemon
            without Ray, which averages for it.
        ray_peak_rss_bytes: That of Ray's processes; 0 for the peers.
        site_peak_rss_bytes: That of a site's process tree, the largest of the sites.
    """

    wall_s: Sequence[float]
    cpu_s: Sequence[float]
    foreign_cores: float
    server_peak_rss_bytes: int
    ray_peak_rss_bytes: int
    site_peak_rss_bytes: int
