"""`farflung bench exchange` on a small model: all keys, and figures that can be true."""

import json
import subprocess
from pathlib import Path

import pytest

from orchestrator.child import program

KEYS = {
    "wall_s_per_round", "cpu_s_per_round", "daemon_peak_rss_bytes", "ray_peak_rss_bytes",
    "site_peak_rss_bytes", "wire_bytes_per_round", "floor_wall_s_per_round",
    "floor_cpu_s_per_round",
}  # fmt: skip

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(240)]


@pytest.mark.slow
def test_exchange(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["bench", "exchange", "--sites", "2", "--model-mb", "2", "--rounds", "3"]
    done = subprocess.run(
        [*program("farflung", "orchestrator.cli"), *words, "--json", str(file)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert figures.keys() >= KEYS
    assert all(figures[key] > 0 for key in KEYS)
    # Down to two sites and up again, with a little for manifests.
    assert 8e6 <= figures["wire_bytes_per_round"] < 8.1e6
    assert figures["cpu_s_per_round"] > figures["floor_cpu_s_per_round"]
    assert len(figures["wall_s"]) == 2
    for who in ("daemon", "ray", "site"):
        assert 50e6 < figures[f"{who}_peak_rss_bytes"] < 4e9
