"""`farflung bench rounds`: all keys, figures that can be true, and the sites that were asked for."""

import json
import subprocess
from pathlib import Path

import pytest

from orchestrator.child import program

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("e2e"), pytest.mark.timeout(240)]


def test_rounds(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["bench", "rounds", "--sites", "2", "--rounds", "4", "--json", str(file)]
    done = subprocess.run(
        [*program("farflung", "orchestrator.cli"), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert figures["sites"] == 2
    assert len(figures["wall_s"]) == 3  # without the first
    assert min(figures["wall_s"]) <= figures["wall_s_per_round"] <= max(figures["wall_s"])
    # 40 KB down to two sites and up again, in each round.
    assert 160e3 <= figures["wire_bytes_per_round"] < 170e3
    by_group = figures["cpu_s_by_group"]
    assert set(by_group) == {"daemon", "ray", "links", "trainers"}
    assert all(seconds > 0 for seconds in by_group.values())
    assert sum(by_group.values()) == pytest.approx(figures["cpu_s_per_round"])
    assert figures["cpu_s_per_round"] > figures["floor_cpu_s_per_round"] > 0
    assert figures["wall_s_per_round"] > figures["floor_wall_s_per_round"] > 0
    # A link without torch, a trainer with it.
    assert 10e6 < figures["site_pss_bytes"]["link"] < figures["site_pss_bytes"]["trainer"] < 1e9
    assert "wall, ms a round" in done.stdout
