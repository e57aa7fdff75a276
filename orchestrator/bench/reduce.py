"""`farflung bench reduce`: what it costs to make the next model of what sites sent.

Each engine reduces the same inputs, one after the other, as often as asked; then the next case. The
figures are medians, the ratios those of medians of the same run. The floor is that of the mean,
for every rule (see `orchestrator/bench/reduction.py`); the digests of all engines must be equal, and
for the mean that of the floor.

    wall_s, cpu_s        of one reduction, from the closed set to a model that is durable in the store
    peak_rss_bytes       of the process that is what the daemon is, of the largest worker, and of the
                         largest other process of Ray's
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.bench.reduction import RULES, make_inputs
from orchestrator.bench.trial import machine
from orchestrator.compute.protocol import Lines
from protos.chunks import write_durably
from protos.errors import ComputeFailed, ConfigInvalid, DataCorrupt

ENGINE = re.compile(r"floor|in-process|(ray|nodes):[1-9]\d{0,2}")


@dataclass(frozen=True)
class Case:
    """What is reduced.

    Attributes:
        rule: A name of `RULES`.
        sites: Contributions.
        model_bytes: Size of the model.
    """

    rule: str
    sites: int
    model_bytes: int


CASES = (
    Case("mean", 4, 400_000_000),
    Case("mean", 4, 40_000),
    Case("trimmed_mean", 16, 40_000_000),
    Case("median", 16, 40_000_000),
)
"""Measured where nothing else is asked for."""


def run_reduce(
    cases: Sequence[Case], engines: Sequence[str], repeats: int, file: Path | None
) -> list[dict[str, Any]]:
    """Measure, print, and write the figures into a file.

    Args:
        cases: What is reduced.
        engines: Who reduces it; see `orchestrator/bench/reduction.py`.
        repeats: Measured reductions of each; one more comes before and is not counted.
        file: JSON file to write, if any.

    Raises:
        ConfigInvalid: A rule or an engine is not known.
        DataCorrupt: Two engines gave different models.
    """
    if unknown := {case.rule for case in cases} - set(RULES):
        raise ConfigInvalid(f"rule {min(unknown)}: one of {', '.join(RULES)} expected", key="rule")
    for name in engines:
        if not ENGINE.fullmatch(name):
            what = "floor, in-process, ray:WORKERS or nodes:N expected"
            raise ConfigInvalid(f"engine {name}: {what}", key="engines")
    out = Console(stderr=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="farflung-reduce-") as root, ExitStack() as stack:
        out.print(f"Starting {', '.join(engines)} …")
        started = {name: stack.enter_context(_engine(name, Path(root))) for name in engines}
        for number, case in enumerate(cases):
            out.print(f"{case.rule} of {case.sites} x {case.model_bytes / 1e6:g} MB …")
            folder = Path(root, str(number))
            nbytes = make_inputs(folder, case.sites, case.model_bytes)
            found.append(_figures(case, nbytes, _measure(case, folder, started, repeats)))
            shutil.rmtree(folder)
    figures = {"cases": found, "repeats": repeats, "machine": machine()}
    if file is not None:
        write_durably(file.absolute(), (json.dumps(figures, indent=2) + "\n").encode())
    _print(found)
    return found


@contextmanager
def _engine(name: str, folder: Path) -> Iterator[Lines]:
    with (folder / "engines.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "orchestrator.bench.reduction", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert process.stdin  # noqa: S101 - for the type checker, as the next line
    assert process.stdout  # noqa: S101
    lines = Lines(process.stdout, process.stdin)
    try:
        if lines.receive() is None:
            raise ComputeFailed(f"bench: {name} did not start\n{_tail(folder)}")
        yield lines
    finally:
        process.stdin.close()
        process.wait()
        process.stdout.close()


def _tail(folder: Path) -> str:
    return (folder / "engines.log").read_text(errors="replace")[-2000:]


def _measure(
    case: Case, folder: Path, engines: dict[str, Lines], repeats: int
) -> dict[str, list[dict[str, Any]]]:
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for turn in range(repeats + 1):
        for name, lines in engines.items():
            lines.send({"folder": str(folder), "rule": case.rule})
            answer = lines.receive()
            if answer is None:
                raise ComputeFailed(f"bench: {name} ended\n{_tail(folder.parent)}")
            if turn:
                answers[name].append(answer)
    digests = {
        name: {answer["digest"] for answer in found}
        for name, found in answers.items()
        if name != "floor" or case.rule == "mean"
    }
    if len(set().union(*digests.values())) > 1:
        raise DataCorrupt(f"bench: {case}: the engines' models differ: {digests}")
    return answers


def _figures(
    case: Case, model_bytes: int, answers: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    engines = {}
    for name, found in answers.items():
        kinds = {kind for answer in found for kind in answer["peaks"]}
        engines[name] = {
            **{key: median(answer[key] for answer in found) for key in ("wall_s", "cpu_s")},
            "every": {key: [answer[key] for answer in found] for key in ("wall_s", "cpu_s")},
            "peak_rss_bytes": {
                kind: max(answer["peaks"].get(kind, 0) for answer in found)
                for kind in sorted(kinds)
            },
        }
    if (floor := engines.get("floor")) is not None:
        for values in engines.values():
            for key in ("wall", "cpu"):
                values[f"{key}_ratio"] = values[f"{key}_s"] / floor[f"{key}_s"]
    return {
        "rule": case.rule,
        "sites": case.sites,
        "model_bytes": model_bytes,
        "digest": next(
            (found[0]["digest"] for name, found in answers.items() if name != "floor"), ""
        ),
        "engines": engines,
    }


def _print(found: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("reduction", no_wrap=True)
    for title in ("wall s", "ratio", "CPU s", "ratio", "daemon", "worker", "Ray, MB"):
        table.add_column(title, justify="right", no_wrap=True)
    for case in found:
        size = f"{case['sites']} x {case['model_bytes'] / 1e6:.3g} MB"
        table.add_row(f"{case['rule']}, {size}")
        for name, values in case["engines"].items():
            cells = []
            for key in ("wall", "cpu"):
                ratio = values.get(f"{key}_ratio")
                cells += [f"{values[f'{key}_s']:.3f}", "" if ratio is None else f"{ratio:.2f}"]
            peaks = values["peak_rss_bytes"]
            for kind in ("daemon", "worker", "ray"):
                cells.append(f"{peaks[kind] / 1e6:.0f}" if kind in peaks else "")
            table.add_row(f"  {name}", *cells)
    Console().print(table)
    Console().print("Every engine gave the same model, bit for bit.")
