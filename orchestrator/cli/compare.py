"""`farflung compare`: what a difference between runs is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli.options import Home, Json, complete_run, operator
from orchestrator.cli.output import print_json, say

if TYPE_CHECKING:
    from rich.table import Table

    from orchestrator.comparing import Comparison, Estimate

PERCENT = {"accuracy", "ece", "ece calibrated", "coverage"}


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Names, ids, or patterns such as 'plain-*'; the first one's arm is the yardstick.",
            autocompletion=complete_run,
        ),
    ],
    best: Annotated[
        bool,
        typer.Option("--best", help="Each run's best round by validation, not its last one."),
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Compare runs: accuracy, NLL, ECE, coverage over seeds, with bootstrap intervals.

    Runs that differ in nothing but name and seed are one arm. Arms are compared with the first one
    seed by seed.

    Example: `farflung compare 'plain-*' 'feddf-*'`
    """
    from orchestrator.comparing import chosen, scored
    from orchestrator.comparing import compare as comparison

    with operator(home) as client:
        found = chosen(runs, client.runs())
        result = comparison([scored(run, client.rounds(run.id), best) for run in found])
    if as_json:
        print_json(result)
        return
    _say(result)


def _say(result: Comparison) -> None:
    from orchestrator.comparing import FEW, SCORES

    shown = [score for score in SCORES if any(score in arm.scores for arm in result.arms)]
    table = _table(["arm", "seeds"], shown)
    for arm in result.arms:
        cells = [_cell(arm.scores.get(score), score) for score in shown]
        table.add_row(arm.name, str(len(arm.runs)), *cells)
    say(f"Mean and {100 * result.level:g} % bootstrap interval over the seeds", "", table)
    if len(result.arms) > 1:
        first = result.arms[0].name
        table = _table(["arm", "pairs"], shown)
        for arm in result.arms[1:]:
            pairs = max((e.seeds for e in arm.against.values()), default=0)
            cells = [_cell(arm.against.get(score), score, signed=True) for score in shown]
            table.add_row(arm.name, str(pairs), *cells)
        say("", f"Minus {first}, seed by seed; * where the interval does not hold 0", "", table, "")
        for arm in result.arms:
            said = ", ".join(f"{key} = {value}" for key, value in arm.differs.items())
            say(f"{arm.name}: {said}")
    fewest = min(len(arm.runs) for arm in result.arms)
    if fewest < FEW:
        say(
            "",
            f"{fewest} seed{'s' * (fewest > 1)} of an arm: too few; the intervals are too narrow.",
        )


def _table(first: list[str], scores: list[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first[0])
    for name in (first[1], *scores):
        table.add_column({"nll": "NLL"}.get(name, name.replace("ece", "ECE")), justify="right")
    return table


def _cell(found: Estimate | None, score: str, signed: bool = False) -> str:
    if found is None:
        return "–"
    scale, digits = (100, 2) if score in PERCENT else (1, 4)
    sign = "+" if signed else ""
    text = f"{scale * found.mean:{sign}.{digits}f}"
    if found.low is None or found.high is None:
        return text
    star = "*" if signed and not found.low <= 0 <= found.high else ""
    return f"{text} [{scale * found.low:{sign}.{digits}f}, {scale * found.high:{sign}.{digits}f}]{star}"
