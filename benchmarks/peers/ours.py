"""Farflung: `farflung bench exchange` without its floor."""

from __future__ import annotations

from importlib.metadata import version

from benchmarks.peers.case import Case, Figures
from orchestrator.bench.exchange import measure_exchange


def measure(case: Case) -> tuple[str, Figures]:
    """Its version and figures."""
    told = measure_exchange(case.folder, case.sites, case.model_bytes, case.rounds)
    return version("farflung"), Figures(
        wall_s=told["wall_s"],
        cpu_s=told["cpu_s"],
        foreign_cores=told["foreign_cores"],
        server_peak_rss_bytes=told["daemon_peak_rss_bytes"],
        ray_peak_rss_bytes=told["ray_peak_rss_bytes"],
        site_peak_rss_bytes=told["site_peak_rss_bytes"],
    )
