"""`farflung verify` and `replay`: whether what the ledger says is so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Home, Json, Run, complete_run, home_path, operator
from orchestrator.cli.output import print_json, say


def verify(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN|PATH",
            help="Name or id of a run, or an export of its ledger: ledger.jsonl or its folder.",
            autocompletion=complete_run,
        ),
    ],
    authority: Annotated[
        Path | None,
        typer.Option(
            "--authority",
            metavar="FILE",
            help="The certificate of the federation's authority, for an export; keys/ca.pem of the "
            "home if nothing says otherwise. Have it from the operator, not from beside the export.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Look for anything lost, doubled, altered, reordered or never acknowledged in a run's ledger.

    A run is checked with everything that the store has of it, an export with public keys alone
    and without a daemon. The exit code is 0 if nothing is wrong.

    Example: `farflung verify fashion`

    Example: `farflung verify ./fashion-ledger --authority ca.pem`
    """
    from protos.errors import ERRORS, DataCorrupt

    path = Path(target)
    if path.exists() and (path.is_file() or (path / "ledger.jsonl").exists()):
        from orchestrator.verifying import verify_file

        found = verify_file(path, authority or home_path(home) / "keys" / "ca.pem")
    else:
        with operator(home) as client:
            found = client.verify(target)
    if as_json:
        print_json(found)
    else:
        for finding in (*found.erased, *found.problems):
            say(finding.text)
        counted = (
            f"run {found.run}: {found.entries} entries, {found.committed} committed rounds, "
            f"{found.contributions} contributions"
        )
        say(counted, f"newest entry {found.digest}")
        say(f"{len(found.problems)} problems" if found.problems else "nothing is wrong")
    if found.problems:
        raise typer.Exit(ERRORS[DataCorrupt].exit_code)


def replay(
    run: Run,
    round: Annotated[
        int, typer.Argument(metavar="ROUND", min=1, help="Number of a committed round.")
    ],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Compute a committed round again from what the sites sent, and compare every digest.

    Contributions are kept as [retention] says. The same bits need the same torch and CPU
    capability. The exit code is 0 if everything is the same.

    Example: `farflung replay fashion 7`
    """
    from protos.errors import ERRORS, DataCorrupt

    with operator(home) as client:
        done = client.replay(run, round)
    if as_json:
        print_json(done)
    else:
        say(f"Round {done.round} of {done.run}, from {', '.join(done.sites)}:")
        for one in done.compared:
            if one.recorded == one.computed:
                say(f"  {one.what}: the same, {one.recorded}")
            else:
                where = f", in {', '.join(one.tensors)}" if one.tensors else ""
                say(f"  {one.what}: recorded {one.recorded or 'none'}")
                say(f"    computed again {one.computed or 'none'}: they differ{where}")
        for note in done.notes:
            say(f"  {note}")
        say(
            f"Everything is the same ({done.seconds:.1f} s)."
            if done.identical
            else "It is not what was committed. Another torch or CPU gives other last bits."
        )
    if not done.identical:
        raise typer.Exit(ERRORS[DataCorrupt].exit_code)
