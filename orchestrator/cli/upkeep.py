"""`farflung gc` and `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Home, Json, home_path, operator
from orchestrator.cli.output import print_json, say


def gc(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be removed.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Remove models and contributions that [retention] no longer keeps.

    Example: `farflung gc --dry-run`
    """
    with operator(home) as client:
        done = client.collect(dry_run)
    if as_json:
        print_json(done)
        return
    from orchestrator.cli.tables import size

    verb = "would remove" if done.dry_run else "removed"
    say(f"{verb} {done.files} files, {size(done.bytes)}; {done.kept} stay")
    for name in done.names:
        say(f"  {name}")


def doctor(home: Home = None, as_json: Json = False) -> None:
    """Look for what would go wrong: installation, home, keys, disk, ports, daemon, data.

    The exit code is 0 if nothing failed; warnings do not count.

    Example: `farflung doctor`
    """
    from orchestrator.doctor import examine
    from protos.errors import ERRORS, ConfigInvalid

    findings = examine(home_path(home))
    if as_json:
        print_json({"findings": [finding._asdict() for finding in findings]})
    else:
        from rich.text import Text

        styles = {"ok": "green", "warning": "yellow", "failed": "bold red"}
        for finding in findings:
            word = Text(f"{finding.state:<9}", style=styles[finding.state])
            say(word.append(f"{finding.about}: {finding.message}", style="default"))
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(ERRORS[ConfigInvalid].exit_code)
