"""``farflung-site doctor``."""

from __future__ import annotations

import typer

from site_agent.cli.options import HomeOption, JsonOption
from site_agent.cli.output import console, print_json


def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Check everything that is known to go wrong, without changing anything."""
    from site_agent.doctor import examine
    from site_agent.home import Home

    findings = examine(Home.at(home))
    failed = any(f.state == "failed" for f in findings)
    if as_json:
        print_json({"ok": not failed, "findings": [f._asdict() for f in findings]})
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
        for finding in findings:
            state = Text(finding.state, style=styles[finding.state])
            table.add_row(state, Text(finding.about), Text(finding.message))
        console().print(table)
    if failed:
        raise typer.Exit(1)
