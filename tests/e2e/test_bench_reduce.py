"""`farflung bench reduce` on a model of 3 MB: the figures are there, and the models are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.child import program
from protos.errors import ConfigInvalid

SECONDS = 240


@pytest.mark.slow
@pytest.mark.xdist_group("ray")
@pytest.mark.timeout(SECONDS)
def test_every_engine_gives_the_floors_model(tmp_path: Path) -> None:
    file = tmp_path / "reduce.json"
    words = ["bench", "reduce", "--rules", "mean,median", "--model-mb", "3", "--repeats", "1"]
    engines = ["--engines", "floor,in-process,ray:1", "--json", str(file)]
    done = subprocess.run(
        [*program("farflung", "orchestrator.cli"), *words, *engines],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "ray:1" in done.stdout
    cases = json.loads(file.read_text())["cases"]
    assert [case["rule"] for case in cases] == ["mean", "median"]
    for case in cases:
        assert 2.9e6 < case["model_bytes"] < 3.1e6
        assert set(case["engines"]) == {"floor", "in-process", "ray:1"}
        for values in case["engines"].values():
            assert values["cpu_ratio"] > 0
            assert values["wall_ratio"] > 0
        # The process that stands for the daemon has no torch in it, the worker has.
        peaks = case["engines"]["ray:1"]["peak_rss_bytes"]
        assert peaks["daemon"] < 150e6 < peaks["worker"]


def test_an_unknown_rule_or_engine_is_named() -> None:
    from orchestrator.bench.reduce import Case, run_reduce

    with pytest.raises(ConfigInvalid, match="rule mode: one of mean, "):
        run_reduce([Case("mode", 2, 1000)], ["floor"], 1, None)
    with pytest.raises(ConfigInvalid, match="engine ray: floor, "):
        run_reduce([Case("mean", 2, 1000)], ["floor", "ray"], 1, None)


def test_the_process_that_is_the_daemon_imports_no_torch() -> None:
    script = "import sys, orchestrator.bench.reduction; print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
