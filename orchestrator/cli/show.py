"""`farflung runs`, `rounds` and `export`: what became of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Home, Json, Run, operator
from orchestrator.cli.output import print_json, say


def list_runs(home: Home = None, as_json: Json = False) -> None:
    """List all runs, newest last.

    Example: `farflung runs --json`
    """
    with operator(home) as client:
        found = client.runs()
    if as_json:
        print_json(found)
        return
    if not found:
        say("No run yet: `farflung launch run.toml` starts one.")
        return
    from orchestrator.cli.tables import run_table

    say(run_table(found))


def list_rounds(run: Run, home: Home = None, as_json: Json = False) -> None:
    """List the rounds of a run: sites, scores, change, bytes, seconds.

    Example: `farflung rounds fashion --json`
    """
    with operator(home) as client:
        found = client.rounds(run)
    if as_json:
        print_json(found)
        return
    if not found:
        say(f"Run {run} has no round yet.")
        return
    from orchestrator.cli.tables import round_table

    say(round_table(found))
    for entry in found:
        for site, reason in entry.missing.items():
            say(f"round {entry.round}: {site} was not counted: {reason}")
        for site, reason in entry.unassessed.items():
            say(f"round {entry.round}: {site} did not evaluate the model: {reason}")


def export(
    run: Run,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write into.", file_okay=False)
    ],
    round: Annotated[
        str,
        typer.Option(
            "--round",
            metavar="N|best",
            help="Which round's model; the last one if empty.",
            show_default=False,
        ),
    ] = "",
    of: Annotated[
        str,
        typer.Option(
            "--of",
            metavar="STRATEGY",
            help="What this strategy keeps beside the model, instead of the model: a distilled "
            "student, a tree.",
            show_default=False,
        ),
    ] = "",
    stored: Annotated[
        bool,
        typer.Option(
            "--stored",
            help="The model as it is stored, with what strategies need in training only (further "
            "branches, a teacher): a run can start from it.",
        ),
    ] = False,
    ledger: Annotated[
        bool,
        typer.Option(
            "--ledger",
            help="The run's ledger instead of a model (ledger.jsonl): what anybody needs, with the "
            "authority's certificate, to check it with `farflung verify`.",
        ),
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Write a model (safetensors) with manifest, calibration, configuration and model card.

    Example: `farflung export fashion --round best ./fashion-model`
    Or, what was distilled beside it: `farflung export fashion --of student ./fashion-student`
    Or, to be checked elsewhere: `farflung export fashion --ledger ./fashion-ledger`
    """
    from protos.errors import InvalidInput

    if round not in ("", "best") and not round.isdecimal():
        raise InvalidInput(f'--round: "{round}" is neither a number nor "best"')
    with operator(home) as client:
        files = client.export(run, round, directory, of, stored, ledger)
    if as_json:
        print_json({"directory": str(directory), "files": [file.name for file in files]})
        return
    for file in files:
        say(f"{file.stat().st_size:>12,}  {file}")
