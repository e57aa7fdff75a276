"""``farflung-site logs``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from site_agent.cli.options import HomeOption, JsonOption

POLL_S = 0.3


def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the last.", min=0)] = 50,
    trainer: Annotated[
        bool, typer.Option("--trainer", help="What the trainer and the task printed.")
    ] = False,
    sent: Annotated[bool, typer.Option("--sent", help="What left this site.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the agent's log."""
    import json

    from protos.errors import NotFound
    from site_agent.cli.running import _print_words
    from site_agent.home import Home

    place = Home.at(home)
    path = place.trainer_log if trainer else place.sent_log if sent else place.agent_log
    if not path.exists():
        raise NotFound(f"{path}: there is no log yet")

    def show(line: str) -> None:
        if as_json or trainer or sent:
            sys.stdout.write(line + "\n")
            return
        try:
            _print_words(json.loads(line))
        except (ValueError, KeyError):
            sys.stdout.write(line + "\n")

    position = _last(path, lines, show)
    while follow:
        sys.stdout.flush()
        position = _new(path, position, show)
        time.sleep(POLL_S)


def _last(path: Path, count: int, show: Callable[[str], None]) -> int:
    text = path.read_text(encoding="utf-8", errors="replace")
    for line in text.splitlines()[-count:] if count else ():
        show(line)
    return path.stat().st_size


def _new(path: Path, position: int, show: Callable[[str], None]) -> int:
    size = path.stat().st_size if path.exists() else 0
    if size < position:  # a new file took its place
        position = 0
    with path.open("rb") as file:
        file.seek(position)
        data = file.read()
    whole = data[: data.rfind(b"\n") + 1]
    for line in whole.decode(errors="replace").splitlines():
        show(line)
    return position + len(whole)
