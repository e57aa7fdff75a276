"""Rows: run the claims of papers through a real orchestrator and real sites, and say what held.

    python -m benchmarks.evidence_seeds [--rows 5,46] [--seeds 6] [--data fashion-mnist]

For every row each arm is one run a seed, all in one federation. The last lines are one a row,
``row 5 co_learning: holds`` or what fell short; the exit code is 1 if any did. The tables go into
docs/evidence.md, between the marks of their row, whatever they show, and the figures to
strategies/measured, where `farflung strategies NAME` finds them.

With other data than a row's own its table is information beside it: bars and claim are of the row's own.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from strategies.row import FIGURES, Measured, Row, Scores, Seed, merged, rows

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "docs/evidence.md"
HEAD = """# Evidence

What the methods do here, measured through a real orchestrator and real site agents by
`make evidence-seeds`; negative results included. Each table is written by the program, and no bar
is tuned until it passes.
"""

Launch = Callable[[dict[str, Any]], Any]
"""Runs a run file to its end; gives the harness's RunResult."""


def task_source(module: str) -> str:
    """Where the task of a row is: the class named like the module, in capitals."""
    return f"{ROOT / 'benchmarks/tasks' / module}.py:{module.upper()}"


def measured(result: Any) -> Scores:
    """The scores of a run, what plug-ins reported of its last round, and what it cost."""
    return {
        **{name: float(value) for name, value in result.scores.items()},
        **{
            f"{plugin.name}.{key}": float(value)
            for plugin in result.rounds[-1].plugins
            for key, value in plugin.report.items()
        },
        "exchanges": float(len(result.rounds)),
        "wire_bytes": float(result.wire_bytes),
        "seconds": float(result.seconds),
    }


def run_seed(row: Row, seed: int, launch: Launch) -> Seed:
    """All arms of a row with one seed."""
    out: dict[str, Scores] = {}
    for arm in row.arms:
        out[arm] = measured(launch(row.config(arm, seed)))
        shown = [
            f"{column.score.removeprefix('test.')} {out[arm][column.score]:.4f}"
            for column in _columns(set(out[arm]))
            if column.score.startswith("test.") and column.score in out[arm]
        ]
        took = out[arm]["seconds"]
        print(f"row {row.number} seed {seed} {arm}: {', '.join(shown)} [{took:.0f} s]", flush=True)
    if row.beside:
        module = importlib.import_module(f"benchmarks.tasks.{row.task}")
        found: Seed = module.controls(seed, **row.run["task"].get("params", {}))
        out.update({arm: found[arm] for arm in row.beside})
    return out


def run_row(row: Row, seeds: int) -> list[Seed]:
    """All seeds of a row, in one federation."""
    from benchmarks.harness import Federation

    with Federation(
        sites=[site.name for site in row.sites],
        tasks={row.task: task_source(row.task)},
        settings={site.name: dict(site.settings) for site in row.sites},
        policy=row.policy,
    ) as federation:
        return [run_seed(row, seed, federation.run) for seed in range(seeds)]


def on_other_data(row: Row, data: str) -> Row:
    """The row with other pictures."""
    return row._replace(run=merged(row.run, {"task": {"params": {"data": data}}}), data=data)


def table(row: Row, seeds: Sequence[Seed], short: Sequence[str]) -> str:
    """The row's part of docs/evidence.md."""
    lines = [
        f"## Row {row.number}: {row.method}",
        "",
        f"Claim: {row.claim} Control: {row.control}. Data: {row.data}, {len(seeds)} seeds.",
        f"Reproduced: {row.reproduced}.",
        "",
        *_figures(row, seeds),
        "",
        "All bars hold." if not short else "Fell short: " + "; ".join(short) + ".",
    ]
    return "\n".join(lines)


def information(row: Row, seeds: Sequence[Seed], short: Sequence[str]) -> str:
    """What stands below that, of a row on other data."""
    return "\n".join(
        [
            f"### Row {row.number}, {row.method}, on {row.data}",
            "",
            f"As information, {len(seeds)} seeds; arms and rates are those of the row's own data.",
            "",
            *_figures(row, seeds),
            "",
            "The bars of the row's own data would hold."
            if not short
            else "By the bars of the row's own data: " + "; ".join(short) + ".",
        ]
    )


def _figures(row: Row, seeds: Sequence[Seed]) -> list[str]:
    columns = _columns({name for seed in seeds for arm in row.arms for name in seed[arm]})
    lines = [
        "| arm | " + " | ".join(column.title for column in columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for arm in (*row.arms, *row.beside):
        cells = [_spread(seeds, arm, c.score, c.scale, c.digits) for c in columns]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for score in row.scores:
        of = [arm for arm in row.arms if score in seeds[0][arm]]
        values = "; ".join(f"{arm} {_spread(seeds, arm, score, 1, 4)}" for arm in of)
        lines += ["", f"{score}: {values}."]
    return lines


class Column(NamedTuple):
    """A column of a table: a score, by what it is multiplied, and its decimals."""

    title: str
    score: str
    scale: float
    digits: int


_SCORES = (
    Column("accuracy %", "test.accuracy", 100, 2),
    Column("NLL", "test.nll", 1, 3),
    Column("ECE", "test.ece", 1, 3),
)
_COSTS = (
    Column("exchanges", "exchanges", 1, 0),
    Column("MB", "wire_bytes", 1e-6, 2),
    Column("seconds", "seconds", 1, 0),
)
_UNSEEN = {"test.brier", "test.loss"}


def _columns(found: set[str]) -> list[Column]:
    """The usual columns (scores only of classifiers), and one for each metric of the task's own."""
    usual = _SCORES if "test.accuracy" in found else ()
    own = sorted(
        name for name in found - _UNSEEN - {c.score for c in usual} if name.startswith("test.")
    )
    metrics = [Column(f"{name.removeprefix('test.')} %", name, 100, 2) for name in own]
    return [*usual, *metrics, *_COSTS]


def _spread(seeds: Sequence[Seed], arm: str, score: str, scale: float, digits: int) -> str:
    values = [scale * seed[arm][score] for seed in seeds if score in seed[arm]]
    if not values:
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{text} ± {spread:.{digits}f}" if spread else text


def written(document: str, what: str, part: str) -> str:
    """The document with the part between its marks replaced, or added at its end."""
    begin, end = f"<!-- {what} -->", f"<!-- end of {what} -->"
    block = f"{begin}\n{part}\n{end}"
    if begin in document and end in document:
        before, _, rest = document.partition(begin)
        return before + block + rest.partition(end)[2]
    return document.rstrip("\n") + f"\n\n{block}\n"


def verdict(row: Row, short: Sequence[str]) -> str:
    """One line a row."""
    name = f"row {row.number} {row.method}"
    return f"{name}: holds" if not short else f"{name}: fell short: {'; '.join(short)}"


def chosen(wanted: str, known: Mapping[int, Row]) -> list[Row]:
    """The rows that are asked for; all of them for nothing.

    Raises:
        SystemExit: A number that no row has.
    """
    if not wanted:
        return list(known.values())
    numbers = [int(part) for part in wanted.replace(" ", "").split(",")]
    missing = [n for n in numbers if n not in known]
    if missing:
        raise SystemExit(f"there is no row {missing[0]}; there are {sorted(known)}")
    return [known[n] for n in numbers]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, judge."""
    parser = argparse.ArgumentParser(prog="evidence-seeds", description=(__doc__ or "")[:99])
    parser.add_argument("--rows", default="", help="numbers, such as 5,46; all by default")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of each row (5)")
    parser.add_argument("--data", default="", help="fashion-mnist: other pictures, as information")
    parser.add_argument("--out", type=Path, default=EVIDENCE, help="where the tables go")
    options = parser.parse_args(arguments)
    figures = FIGURES if options.out == EVIDENCE else options.out.parent / FIGURES.name
    verdicts, failed = [], False
    for own in chosen(options.rows, rows()):
        row = on_other_data(own, options.data) if options.data else own
        seeds = run_row(row, options.seeds)
        short = row.holds(seeds)
        document = options.out.read_text(encoding="utf-8") if options.out.exists() else HEAD
        if options.data:
            what, part = f"row {row.number} on {options.data}", information(row, seeds, short)
        else:
            what, part = f"row {row.number}", table(row, seeds, short)
            failed |= bool(short)
            verdicts.append(verdict(row, short))
            Measured.of(row, seeds, short).write(row.number, figures)
        options.out.write_text(written(document, what, part), encoding="utf-8")
        print("\n" + part + "\n", flush=True)
    print("\n".join(verdicts))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
