"""What ``farflung strategies`` and the generated pages say about a strategy, as JSON."""

from __future__ import annotations

import inspect
import json
import re
import sys
from typing import Any

from strategies.protocol import Strategy
from strategies.registry import catalogue
from strategies.row import Measured, Row

_COMPARISONS = (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<="))


def describe(cls: type[Strategy]) -> dict[str, Any]:
    """Everything that can be said about a strategy without running it.

    Returns:
        JSON: name, summary, family, paper, hooks, needs, warning, fields (name, type, default,
        constraints, doc), degenerate (the hyperparameters that switch it off, or None), check (its
        row: number, claim, control, data, reproduced, measured (what `make evidence-seeds` wrote
        of this very row, or None); or None), doc.
    """
    doc = inspect.cleandoc(cls.__doc__ or "")
    about = attributes(doc)
    row = getattr(sys.modules[cls.__module__], "ROW", None)
    check = None
    if isinstance(row, Row) and row.method == cls.name:
        measured = Measured.read(row)
        check = {
            "row": row.number,
            "claim": row.claim,
            "control": row.control,
            "data": row.data,
            "reproduced": row.reproduced,
            "measured": None if measured is None else measured._asdict(),
        }
    return {
        "name": cls.name,
        "summary": cls.summary,
        "family": cls.family,
        "paper": cls.paper,
        "hooks": list(cls.hooks()),
        "needs": sorted(cls.needs),
        "warning": cls.warning,
        "fields": [
            {
                "name": name,
                "type": _type(field.annotation),
                "default": None
                if field.is_required()
                else _plain(field.get_default(call_default_factory=True)),
                "constraints": _constraints(field.metadata),
                "doc": about.get(name, ""),
            }
            for name, field in cls.model_fields.items()
        ],
        "degenerate": None if cls.degenerate is None else _plain(dict(cls.degenerate)),
        "check": check,
        "doc": doc,
    }


def listing() -> list[dict[str, Any]]:
    """`describe` of every strategy in the catalogue, sorted by name."""
    return [describe(cls) for cls in catalogue().values()]


def _plain(value: Any) -> Any:
    """As JSON has it: a list for a tuple."""
    return json.loads(json.dumps(value))


def _type(annotation: Any) -> str:
    if isinstance(annotation, type):
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _constraints(metadata: list[Any]) -> str:
    parts = []
    for rule in metadata:
        for name, sign in _COMPARISONS:
            value = getattr(rule, name, None)
            if value is not None:
                parts.append(f"{sign} {value:g}")
    return ", ".join(parts)


def attributes(doc: str) -> dict[str, str]:
    """The entries of the docstring's section "Attributes:", each on one line."""
    _, _, section = doc.partition("\nAttributes:\n")
    out: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if line and not line.startswith(" "):
            break
        entry = re.match(r" {4}(\w+): (.*)", line)
        if entry:
            name = entry[1]
            out[name] = entry[2]
        elif name and line.strip():
            out[name] += " " + line.strip()
    return out
