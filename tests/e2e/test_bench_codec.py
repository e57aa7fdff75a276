"""`farflung bench codec` on a small update: every codec, and figures that can be true."""

import json
import subprocess
from pathlib import Path

import pytest

from orchestrator.child import program

TIMES_FEWER = {"bf16": 2.0, "int8": 3.93, "int4": 7.7, "top_k": 60.0}


@pytest.mark.timeout(120)
def test_codec(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    words = ["bench", "codec", "--model-mb", "4", "--runs", "4", "--json", str(file)]
    done = subprocess.run(
        [*program("farflung", "orchestrator.cli"), *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(file.read_text())
    assert figures["model_bytes"] == 4_000_000
    assert figures["codecs"].keys() >= TIMES_FEWER.keys()
    for name, times in TIMES_FEWER.items():
        row = figures["codecs"][name]
        assert row["times_fewer"] >= times
        assert row["times_fewer"] * row["bytes_per_element"] == pytest.approx(4)
        assert len(row["encode_cpu_s"]) == 3
        assert min(row["encode_gb_per_s"], row["decode_gb_per_s"], row["encode_ratio"]) > 0
        assert name in done.stdout
