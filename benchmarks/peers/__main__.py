"""Measure the three systems one after the other, at each size; see the package's page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

from benchmarks.peers import flare, flower, ours
from benchmarks.peers.case import Case, Figures
from benchmarks.peers.table import OURS, PEERS, Result, Results, part, replaced, shortfalls
from protos.errors import FarflungError

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
ENVIRONMENTS = ROOT / "build/peers"
"""Where `make` puts the peers' environments."""

Measure = Callable[[Case], tuple[str, Figures]]
SYSTEMS: dict[str, tuple[Measure, Path]] = {
    OURS: (ours.measure, Path(sys.prefix)),
    PEERS[0]: (flower.measure, ENVIRONMENTS / "flower"),
    PEERS[1]: (flare.measure, ENVIRONMENTS / "flare"),
}


def measure(system: str, sites: int, model_bytes: int, rounds: int) -> Result:
    """One system at one size; a failure is a result too."""
    run, environment = SYSTEMS[system]
    with tempfile.TemporaryDirectory(
        prefix="farflung-peers-", ignore_cleanup_errors=True
    ) as folder:
        try:
            release, figures = run(Case(sites, model_bytes, rounds, Path(folder), environment))
        except FarflungError as error:
            print(error.message, file=sys.stderr, flush=True)
            return Result(system, "", model_bytes, error=error.message.splitlines()[0])
    return Result(system, release, model_bytes, figures)


def measure_all(sites: int, sizes: Sequence[int], rounds: int, file: Path | None) -> Results:
    """All systems at all sizes; what is there so far is in the file after each."""
    results: list[Result] = []
    machine = _machine()
    date = datetime.now(UTC).date().isoformat()
    for size in sizes:
        for system in SYSTEMS:
            print(f"{system}, {size / 1e6:g} MB …", file=sys.stderr, flush=True)
            results.append(measure(system, sites, size, rounds))
            so_far = Results(date, machine, sites, rounds, results)
            if file is not None:
                file.write_text(json.dumps(so_far.to_json(), indent=2) + "\n")
    return Results(date, machine, sites, rounds, results)


def _machine() -> dict[str, str]:
    names = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    return {
        "processor": ", ".join(sorted(names)) or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "Linux": platform.release(),
        "Python": platform.python_version(),
        "torch": version("torch"),
    }


def _sizes(text: str) -> list[int]:
    return [round(float(word) * 1e6) for word in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure or read, print, write; 1 if a bar falls short."""
    parser = argparse.ArgumentParser(prog="peers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--sizes", type=_sizes, default=_sizes("10,100,400"), help="of the model, 10^6 bytes"
    )
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4, help="the first is left out (4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument(
        "--from", type=Path, metavar="FILE", dest="source", help="measure nothing, read this"
    )
    parser.add_argument(
        "--readme", action="store_true", help="write the table into README.md, between its marks"
    )
    asked = parser.parse_args(arguments)
    if asked.rounds < 2 or asked.sites < 2:
        parser.error("at least 2 rounds and 2 sites are needed")
    if asked.source is not None:
        results = Results.from_json(json.loads(asked.source.read_text()))
    else:
        # A plain end, so that every block that started processes ends them.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        # If memory runs out after all, the kernel shall take this first; children inherit it.
        Path("/proc/self/oom_score_adj").write_text("1000")
        results = measure_all(asked.sites, asked.sizes, asked.rounds, asked.json)
    text = part(results)
    print(text)
    if asked.readme:
        README.write_text(replaced(README.read_text(), text))
    return 1 if shortfalls(results) else 0


if __name__ == "__main__":
    sys.exit(main())
