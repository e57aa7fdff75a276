"""`farflung strategies`: the catalogue of methods."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from orchestrator.cli.options import Json
from orchestrator.cli.output import print_json, say


def complete_strategy(incomplete: str) -> list[str]:
    """Names of strategies, read off the files: importing them all would take too long."""
    from pathlib import Path

    import strategies as package

    files = Path(next(iter(package.__path__))).glob("*/*.py")
    names = {f.stem for f in files if "name: ClassVar[str] =" in f.read_text(encoding="utf-8")}
    return sorted(name for name in names if name.startswith(incomplete))


def strategies(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="One strategy in full; all if empty.",
            autocompletion=complete_strategy,
            show_default=False,
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """List the methods that a run file may name, or explain one with its hyperparameters.

    Example: `farflung strategies co_learning`
    """
    from protos.errors import NotFound
    from strategies.listing import describe, listing
    from strategies.registry import catalogue

    known = catalogue()
    if name and name not in known:
        from difflib import get_close_matches

        near = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise NotFound(f"strategy: there is no {name}{hint}", name=name)
    if name:
        facts = describe(known[name])
        if as_json:
            print_json(facts)
        else:
            _explain(facts)
        return
    rows = listing()
    if as_json:
        print_json({"strategies": rows})
    else:
        _list(rows)


def _check(row: dict[str, Any]) -> str:
    """Whether the paper's claim was seen to hold, of the row that stands beside the method."""
    check = row["check"]
    return f"row {check['row']}: {check['reproduced']}" if check else "–"


def _list(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("name", "what it does", "family", "hooks", "needs", "claim holds"):
        table.add_column(title, overflow="fold", no_wrap=title == "name")
    for row in rows:
        table.add_row(
            row["name"],
            row["summary"],
            row["family"],
            " ".join(row["hooks"]),
            ", ".join(row["needs"]) or "–",
            _check(row),
        )
    say(table)


def _explain(facts: dict[str, Any]) -> None:
    from orchestrator.toml_text import literal

    say(f"{facts['name']}  ({facts['family']})", "", facts["doc"], "")
    for title in ("paper", "hooks", "needs", "warning"):
        value = facts[title]
        if value:
            say(f"{title}: {value if isinstance(value, str) else ', '.join(value)}")
    if facts["degenerate"] is not None:
        off = ", ".join(f"{key} = {literal(v)}" for key, v in facts["degenerate"].items())
        say(f"switched off, to the bit, by: {off or 'nothing: it only looks'}")
    _say_evidence(facts["check"])
    say("", "In a run file:", "", "[[strategy]]", f'name = "{facts["name"]}"')
    for field in facts["fields"]:
        if field["default"] is not None:
            bounds = f"   # {field['constraints']}" if field["constraints"] else ""
            say(f"{field['name']} = {literal(field['default'])}{bounds}")


SHOWN = {
    "accuracy %": ("test.accuracy", 100, 2),
    "NLL": ("test.nll", 1, 3),
    "ECE %": ("test.ece", 100, 2),
    "ECE calibrated %": ("test_calibrated.ece", 100, 2),
}
"""Columns of the measured figures: score, scale, digits."""

UNSEEN = {"test.brier", "test.loss"}


def _say_evidence(check: dict[str, Any] | None) -> None:
    """The claim that stands beside the method, and what its row came to."""
    if check is None:
        say("", "No row: what it does was not measured against a control.")
        return
    say("", f"Claim (row {check['row']}): {check['claim']}", f"Control: {check['control']}.")
    measured = check["measured"]
    if measured is None:
        say(
            f"Data: {check['data']}. Reproduced: {check['reproduced']}; no figures of this row as it is"
        )
        say(f"now: `make evidence-seeds ROWS={check['row']}` in a clone measures them.")
        return
    from rich.table import Table

    say(f"Data: {check['data']}, {measured['seeds']} seeds. Reproduced: {check['reproduced']}.", "")
    found = {name for scores in measured["arms"].values() for name in scores}
    columns = {title: how for title, how in SHOWN.items() if how[0] in found}
    for name in sorted(found - UNSEEN - {how[0] for how in SHOWN.values()}):
        if name.startswith("test."):  # a metric of the task's own
            columns[f"{name.removeprefix('test.')} %"] = (name, 100, 2)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("measured")
    for title in columns:
        table.add_column(title, justify="right")
    for arm, scores in measured["arms"].items():
        cells = []
        for name, scale, digits in columns.values():
            mean, deviation = scores.get(name, (None, None))
            known = mean is not None and deviation is not None
            cells.append(
                f"{scale * mean:.{digits}f} ± {scale * deviation:.{digits}f}" if known else "–"
            )
        table.add_row(arm, *cells)
    say(
        table,
        "",
        "Fell short: " + "; ".join(measured["short"]) if measured["short"] else "All bars hold.",
    )
