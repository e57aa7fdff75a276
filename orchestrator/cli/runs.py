"""`farflung launch`, `watch`, `stop`, `extend`, `release`, `reject` and `rollback`: what moves a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Home, Json, Run, complete_run, complete_start, operator
from orchestrator.cli.output import print_json, say


def launch(
    file: Annotated[
        Path, typer.Argument(metavar="RUN.TOML", help="The run's configuration.", dir_okay=False)
    ],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show how it goes.")] = False,
    start: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="START",
            help="First model: RUN@best, RUN@ROUND, FILE.safetensors, site:NAME or task; "
            "instead of what the file says under [init].",
            show_default=False,
            autocompletion=complete_start,
        ),
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Submit a run; it queues behind others and goes on whether anybody watches or not.

    With --follow the exit code tells how it ended: 0 only if every round had all its sites.

    Example: `farflung launch run.toml --follow`

    Example: `farflung launch run.toml --from fashion@best`
    """
    from orchestrator.run_file import read_run_file

    text, start_from, start_file = read_run_file(file, start)
    with operator(home) as client:
        run = client.launch(text, start_from, start_file)
        if not follow:
            if as_json:
                print_json(run)
                return
            say(f"Run {run.name} ({run.id}) is {run.state}. `farflung watch {run.name}` shows it.")
            return
        from orchestrator.cli.follow import follow_run

        code = follow_run(client, run.id, as_json)
    raise typer.Exit(code)


def watch(
    run: Annotated[
        str,
        typer.Argument(
            metavar="[RUN]",
            help="Name or id of a run; everything if there is none.",
            autocompletion=complete_run,
            show_default=False,
        ),
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Follow a run: rounds, sites, scores, bytes. Ctrl-C stops following, never the run.

    With --json each event is one line.

    Example: `farflung watch fashion`
    """
    from orchestrator.cli.follow import follow_everything, follow_run

    with operator(home) as client:
        code = follow_run(client, run, as_json) if run else follow_everything(client, as_json)
    raise typer.Exit(code)


def stop(
    run: Run,
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for the round under way; drop it.")
    ] = False,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """End a run after the round under way; its committed rounds stay.

    Example: `farflung stop fashion`
    """
    with operator(home) as client:
        stopped = client.stop(run, now)
    if as_json:
        print_json(stopped)
        return
    say(stopped.headline or f"Run {stopped.name}: {stopped.state}.")


def extend(
    run: Run,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="How many rounds the run has then, in all.")
    ],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let a run have N rounds in all; a finished one goes on, a paused one tries again.

    Example: `farflung extend fashion --rounds 20`
    """
    with operator(home) as client:
        extended = client.extend(run, rounds)
    if as_json:
        print_json(extended)
        return
    say(f"Run {extended.name} now has {extended.rounds} rounds; it is {extended.state}.")


def release(run: Run, home: Home = None, as_json: Json = False) -> None:
    """Commit the round that a run waits with, as it is; the run goes on.

    Nothing is trained again. `farflung rounds` shows why the round is held, and its scores.

    Example: `farflung release fashion`
    """
    with operator(home) as client:
        released = client.release(run)
    if as_json:
        print_json(released)
        return
    say(f"Run {released.name}: the held round is committed; it is {released.state}.")


def reject(run: Run, home: Home = None, as_json: Json = False) -> None:
    """Drop the round that a run waits with; the run goes on from the last good model.

    Example: `farflung reject fashion`
    """
    with operator(home) as client:
        rejected = client.reject(run)
    if as_json:
        print_json(rejected)
        return
    say(f"Run {rejected.name}: the held round is dropped; it is {rejected.state}.")


def rollback(
    run: Run,
    round: Annotated[
        int, typer.Argument(metavar="ROUND", min=0, help="The last round that stays.")
    ],
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Let a stopped, paused or finished run go on from an earlier round.

    The rounds after it stay in the ledger as superseded, and are trained again.

    Example: `farflung rollback fashion 7`
    """
    with operator(home) as client:
        back = client.roll_back(run, round)
    if as_json:
        print_json(back)
        return
    say(f"Run {back.name} goes on from round {round} of {back.rounds}; it is {back.state}.")
