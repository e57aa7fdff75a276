"""Names that are not there, and the ones that may have been meant."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from protos.errors import NotFound


def not_found(what: str, name: str, names: Sequence[str]) -> NotFound:
    """The error for a name that is not among some names; it names up to three that are near."""
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        hint = f"Did you mean {' or '.join(near)}?"
    elif names:
        hint = f"There are: {', '.join(sorted(names)[:10])}."
    else:
        hint = f"There is no {what} yet."
    return NotFound(f"{what} {name}: not found. {hint}", name=name)
