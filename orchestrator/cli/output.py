"""What a command prints: JSON for programs, words for people, errors for both."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

PIPE_WIDTH = 200
"""Columns of a table that goes into a file or a pipe, where nothing says how wide it may be."""


def console(stderr: bool = False) -> Console:
    """A console on standard output or standard error; colours only where a person looks."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    wide = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(
        stderr=stderr, highlight=False, soft_wrap=False, width=PIPE_WIDTH if wide else None
    )


def print_json(value: BaseModel | Sequence[BaseModel] | Mapping[str, Any]) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_json_line(value: BaseModel | Mapping[str, Any]) -> None:
    """One line of JSON on standard output, at once."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def plain(value: BaseModel | Sequence[BaseModel] | Mapping[str, Any]) -> Any:
    """A view, or several, as what `json` takes."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):
        return [item.model_dump(mode="json") for item in value]
    return value.model_dump(mode="json")


def say(*what: RenderableType) -> None:
    """Something for people on standard output; markup is not interpreted in it."""
    console().print(*what, sep="\n", markup=False)


def complain(message: str, as_json: bool, **more: Any) -> None:
    """One red sentence on standard error, or a line of JSON."""
    if as_json:
        sys.stderr.write(json.dumps({"message": message, **more}, ensure_ascii=False) + "\n")
        return
    from rich.text import Text

    console(stderr=True).print(Text(f"farflung: {message}", style="bold red"), soft_wrap=True)
