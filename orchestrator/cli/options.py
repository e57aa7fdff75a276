"""Options that several commands share, and what the shell completes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orchestrator.client import OperatorClient

HOME_VARIABLE = "FARFLUNG_HOME"


def home_path(home: Path | None) -> Path:
    """The home that is meant: the one given, or the default one."""
    from orchestrator.config import DEFAULT_HOME

    return (home or DEFAULT_HOME).expanduser().absolute()


@contextmanager
def operator(home: Path | None) -> Iterator[OperatorClient]:
    """A client of the daemon on a home."""
    from orchestrator.client import OperatorClient

    with OperatorClient(home_path(home)) as client:
        yield client


def _completed(names: Callable[[OperatorClient], list[str]]) -> Callable[..., list[str]]:
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        try:
            with operator(ctx.params.get("home")) as client:
                found = names(client)
        except Exception:  # noqa: BLE001  # a shell that completes must not be disturbed
            return []
        return [name for name in dict.fromkeys(found) if name.startswith(incomplete)]

    return complete


complete_run = _completed(lambda client: [run.name for run in client.runs()])
complete_site = _completed(lambda client: [site.name for site in client.sites()])
complete_start = _completed(lambda client: [f"{run.name}@best" for run in client.runs()])

Home = Annotated[
    Path | None,
    typer.Option(
        "--home",
        envvar=HOME_VARIABLE,
        help="The daemon's home folder; ~/.farflung if nothing says otherwise.",
        show_default=False,
        file_okay=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Run = Annotated[
    str,
    typer.Argument(metavar="RUN", help="Name or id of a run.", autocompletion=complete_run),
]
Site = Annotated[
    str,
    typer.Argument(metavar="SITE", help="Name of a site.", autocompletion=complete_site),
]
