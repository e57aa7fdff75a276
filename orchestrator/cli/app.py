"""All commands in one place, and the one place where an error becomes a sentence and an exit code.

Nothing heavy is imported here: each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from orchestrator.cli import catalogue, check, compare, daemon, measure, runs, show, sites, upkeep
from orchestrator.cli.output import complain
from protos.errors import ERRORS, FarflungError, row

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

HELP = """Train one model across data centers without moving the data.

Begin with `farflung demo`, or by hand:

- `farflung init` makes a home folder with a certificate authority of its own
- `farflung serve` is the daemon; it stays in the foreground
- `farflung invite north` prints a join token for a data center's own people
- `farflung launch run.toml --follow` trains
"""

app = typer.Typer(
    name="farflung",
    help=HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"farflung {version('farflung')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None: ...


DAEMON = "The daemon"
SITES = "Sites"
RUNS = "Runs"
MORE = "More"

app.command(rich_help_panel=DAEMON)(daemon.init)
app.command(rich_help_panel=DAEMON)(daemon.serve)
app.command(rich_help_panel=DAEMON)(upkeep.doctor)
app.command(rich_help_panel=DAEMON)(upkeep.gc)
app.command(rich_help_panel=SITES)(sites.invite)
app.command(rich_help_panel=SITES)(sites.revoke)
app.command("sites", rich_help_panel=SITES)(sites.list_sites)
app.command(rich_help_panel=RUNS)(runs.launch)
app.command(rich_help_panel=RUNS)(runs.watch)
app.command(rich_help_panel=RUNS)(runs.stop)
app.command(rich_help_panel=RUNS)(runs.extend)
app.command(rich_help_panel=RUNS)(runs.release)
app.command(rich_help_panel=RUNS)(runs.reject)
app.command(rich_help_panel=RUNS)(runs.rollback)
app.command("runs", rich_help_panel=RUNS)(show.list_runs)
app.command("rounds", rich_help_panel=RUNS)(show.list_rounds)
app.command(rich_help_panel=RUNS)(show.export)
app.command(rich_help_panel=RUNS)(check.verify)
app.command(rich_help_panel=RUNS)(check.replay)
app.command("compare", rich_help_panel=RUNS)(compare.compare)
app.command("strategies", rich_help_panel=MORE)(catalogue.strategies)
app.command(rich_help_panel=MORE)(measure.demo)
app.add_typer(measure.bench, name="bench", rich_help_panel=MORE)


def run(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code.

    Args:
        arguments: The words after `farflung`; those of this process by default.
    """
    words = sys.argv[1:] if arguments is None else arguments
    sys.exit(code_of(words))


def code_of(words: list[str]) -> int:
    """Run a command and give its exit code; errors are said on standard error."""
    as_json = "--json" in words
    try:
        result = app(args=words, prog_name="farflung", standalone_mode=False)
    except FarflungError as error:
        complain(error.message, as_json, error=type(error).__name__, facts=error.facts)
        return row(error).exit_code
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted", as_json, error="Interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, `head` perhaps, had enough; Python would complain at exit.
        sys.stdout = None
        return 0
    except typer.Exit as ended:
        return ended.exit_code
    except Exception as error:  # noqa: BLE001  # the last boundary before the shell
        usage = getattr(error, "format_message", None)
        if usage is None:
            import traceback

            traceback.print_exc()
            complain(
                f"an internal error, {type(error).__name__}; see above", as_json, error="Internal"
            )
            return ERRORS[FarflungError].exit_code
        if usage():  # empty where the help was printed instead
            complain(f"{usage()} See `farflung --help`.", as_json, error="Usage")
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
