"""What a command prints: JSON for programs, words for people, errors for both."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> Console:
    """A console on standard output or standard error; colours only where a person looks."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """A line for people on standard output; nothing in it is markup."""
    console().print(text, markup=False, soft_wrap=True)


def complain(message: str, as_json: bool, **more: Any) -> None:
    """One red sentence on standard error, or a line of JSON."""
    if as_json:
        sys.stderr.write(json.dumps({"message": message, **more}, ensure_ascii=False) + "\n")
        return
    from rich.text import Text

    console(stderr=True).print(Text(f"farflung-site: {message}", style="bold red"), soft_wrap=True)


def nbytes(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
