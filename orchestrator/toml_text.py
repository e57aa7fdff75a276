"""TOML text from plain values: configurations that programs write."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def document(values: Mapping[str, Any]) -> str:
    """A TOML document.

    Top-level tables become sections, top-level lists of tables ``[[…]]``; what lies deeper is
    written in one line. None values are left out, since TOML has none.

    Raises:
        TypeError: A value that TOML does not know.
    """
    lines: list[str] = []
    sections: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            sections += ["", f"[{name(key)}]", *_pairs(value)]
        elif (
            isinstance(value, list | tuple) and value and all(isinstance(v, Mapping) for v in value)
        ):
            for entry in value:
                sections += ["", f"[[{name(key)}]]", *_pairs(entry)]
        elif value is not None:
            lines.append(f"{name(key)} = {literal(value)}")
    return "\n".join([*lines, *sections]) + "\n"


def name(key: str) -> str:
    """A key, quoted where it must be."""
    return key if BARE_KEY.fullmatch(key) else literal(key)


def literal(value: Any) -> str:
    """A value in one line.

    Raises:
        TypeError: A value that TOML does not know.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, str | PurePath):
        # TOML's basic strings are JSON's, save that DEL must be escaped too.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(_pairs(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    raise TypeError(f"TOML has no {type(value).__name__}: {value!r}")


def _pairs(table: Mapping[str, Any]) -> list[str]:
    return [f"{name(k)} = {literal(v)}" for k, v in table.items() if v is not None]


def _number(value: float) -> str:
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    text = repr(value)
    return text if set(text) & set(".e") else f"{text}.0"
