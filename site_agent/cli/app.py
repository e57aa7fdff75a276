"""All commands in one place, and the one place where an error becomes a sentence and an exit code.

Nothing heavy is imported here: each command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer

from protos.errors import FarflungError, row
from site_agent.cli import asking, checking, joining, logs, running, tasks
from site_agent.cli.output import complain

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

HELP = """The agent of a data center: trains here, and sends weights, never data.

- `farflung-site join TOKEN` takes part in a federation; the operator gives the token
- `site.toml` in the site's folder says which tasks it has and what it accepts
- `farflung-site doctor` checks all that, and `farflung-site task test NAME` trains one step
- `farflung-site run` is the agent; it stays in the foreground
"""

app = typer.Typer(
    name="farflung-site",
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


app.command()(joining.join)
app.command()(running.run)
app.command()(asking.status)
app.command()(logs.logs)
app.command()(asking.pause)
app.command()(asking.resume)
app.command()(asking.leave)
app.add_typer(tasks.app, name="task")
app.command()(checking.doctor)


def run(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and end the process with its exit code.

    Args:
        arguments: The words after `farflung-site`; those of this process by default.
    """
    sys.exit(code_of(sys.argv[1:] if arguments is None else arguments))


def code_of(words: list[str]) -> int:
    """Run a command and give its exit code; errors are said on standard error."""
    as_json = "--json" in words
    try:
        result = app(args=words, prog_name="farflung-site", standalone_mode=False)
    except FarflungError as error:
        complain(error.message, as_json, error=type(error).__name__, facts=error.facts)
        return row(error).exit_code
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output, `head` perhaps, had enough; Python would complain at exit.
        sys.stdout = None
        return 0
    except typer.Exit as ended:
        return ended.exit_code
    except Exception as error:
        usage = getattr(error, "format_message", None)
        if usage is None:
            raise
        if usage():  # empty where the help was printed instead
            complain(f"{usage()} See `farflung-site --help`.", as_json, error="Usage")
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0
