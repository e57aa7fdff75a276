"""Writes what is said in the code only once: `docs/configuration.md` and `docs/strategies/`.

``make docs`` runs it; a test fails if what is committed is not what it would write.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from orchestrator.config import DaemonConfig
from orchestrator.run_config import RunConfig
from orchestrator.toml_text import literal
from site_agent.config import SiteConfig
from strategies.listing import attributes, listing

HERE = Path(__file__).parent

FILES = (
    ("A run: `run.toml`", RunConfig, "What `farflung launch` is given."),
    ("The orchestrator: `farflung.toml`", DaemonConfig, "In the home of `farflung serve`."),
    ("A site: `site.toml`", SiteConfig, "In the home of `farflung-site run`."),
)

FAMILIES = {
    "averaging": "How long do sites train, and how is the mean taken?",
    "outer": "How does the shared model step?",
    "local": "What keeps sites from drifting apart?",
    "robust": "What if a site lies?",
    "compression": "What goes over the wire?",
    "privacy": "What may be learnt about a sample?",
    "calibration": "Can the confidence be trusted?",
    "distillation": "Who teaches whom?",
    "recipes": "Which schedule, start and hygiene?",
    "layers": "Which module replaces a standard one?",
    "metric": "How are embeddings pulled and pushed?",
    "trees": "Can a person read the model?",
    "augmentation": "What does the model see?",
    "labels": "What if labels are missing, contradictory or new?",
    "adaptation": "What if sites are different domains?",
    "condensation": "What if summaries travel instead of weights?",
    "compaction": "What is deployed at a small site?",
    "search": "Which architecture?",
    "architectures": "A whole workload.",
}


def pages() -> dict[str, str]:
    """Every generated page by its path below ``docs``."""
    out = {"configuration.md": configuration()}
    facts = listing()
    out["strategies/README.md"] = overview(facts)
    for family in dict.fromkeys(f["family"] for f in facts):
        own = [f for f in facts if f["family"] == family]
        out[f"strategies/{family}.md"] = "\n\n".join(
            [_mark(f"# {family}: {FAMILIES[family]}"), *map(strategy, own)]
        )
    return {name: text.rstrip() + "\n" for name, text in out.items()}


def _mark(title: str) -> str:
    return f"{title}\n\nWritten by `make docs` from the code; changes belong there."


# -- configuration ------------------------------------------------------------------------------------


def configuration() -> str:
    """Every key of every file that a person writes."""
    parts = [
        _mark("# Configuration"),
        "Three files, all TOML. Unknown keys are refused, and errors name the key. Units stand in names.",
    ]
    for title, model, where in FILES:
        parts += [f"## {title}", where, *_tables(model, "")]
    return "\n\n".join(parts)


def _tables(model: type[BaseModel], path: str) -> Iterator[str]:
    """A table of a model's own keys, then those of the tables below it."""
    about = attributes(cleandoc(model.__doc__ or ""))
    rows, below = [], []
    for name, field in model.model_fields.items():
        key = field.alias or name
        inner, heading = _inner(field, f"{path}.{key}" if path else key)
        if inner is None:
            rows.append(
                f"| `{key}` | {_type(field)} | {_default(field)} | {_cell(about.get(name, ''))} |"
            )
        else:
            below.append((inner, heading, about.get(name, "")))
    if rows:
        yield "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
    for inner, heading, meaning in below:
        yield f"### `{heading}`"
        yield meaning or (inner.__doc__ or "").strip().split("\n\n")[0]
        yield from _tables(inner, heading.strip("[]"))


def _inner(field: FieldInfo, path: str) -> tuple[type[BaseModel] | None, str]:
    """The model of a field that is a table of its own, and how its table is headed."""
    kinds = [field.annotation, *get_args(field.annotation)]
    kinds += [inner for kind in kinds for inner in get_args(kind)]
    model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
    text = str(field.annotation)
    if model is not None and "tuple[" in text:
        return model, f"[[{path}]]"
    return model, f"[{path}.NAME]" if "dict[" in text else f"[{path}]"


TOML = {str: "string", int: "integer", float: "float", bool: "boolean"}
SIGNS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}


def _type(field: FieldInfo) -> str:
    rules = [*field.metadata, *_rules(field.annotation)]
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in rules
        for kind, (name, sign) in SIGNS.items()
        if isinstance(rule, kind)
    ]
    return _cell(", ".join([_toml(field.annotation), *bounds]))


def _toml(kind: Any) -> str:
    """A type in TOML's words."""
    inner = [k for k in get_args(kind) if k not in (type(None), Ellipsis)]
    origin = get_origin(kind)
    if origin is Annotated:
        return _toml(inner[0])
    if origin is Literal:
        return " or ".join(f"`{literal(value)}`" for value in inner)
    if origin is tuple:
        what = " and ".join(_toml(k) for k in inner)
        return f"array of {what}" if Ellipsis in get_args(kind) else f"array: {what}"
    if origin is dict:
        return "table"
    return " or ".join(map(_toml, inner)) if inner else TOML.get(kind, "anything")


def _rules(kind: Any) -> list[Any]:
    """What bounds the values of a type, however deep it stands."""
    own = [
        rule
        for given in getattr(kind, "__metadata__", ())
        for rule in (given, *getattr(given, "metadata", ()))
    ]
    return own + [rule for inner in get_args(kind) for rule in _rules(inner)]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "none" if value is None else _value(list(value) if isinstance(value, tuple) else value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("``", "`")


# -- strategies ---------------------------------------------------------------------------------------


def overview(facts: list[dict[str, Any]]) -> str:
    """All strategies in one table."""
    rows = [
        f"| [`{f['name']}`]({f['family']}.md#{f['name']}) | {_cell(f['summary'])} | {f['family']} | "
        f"{_needs(f)} | {_claim(f)} |"
        for f in facts
    ]
    return "\n".join(
        [
            _mark("# Strategies"),
            "",
            "Names for `[[strategy]]` in a run file; `farflung strategies NAME` says the same in a terminal.",
            "*Claim holds* is what the method's row came to: [evidence](../evidence.md).",
            "",
            "| name | what it does | family | needs | claim holds |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def strategy(facts: dict[str, Any]) -> str:
    """One strategy in full."""
    parts = [f"## {facts['name']}", _plain(facts["doc"].partition("\nAttributes:\n")[0])]
    about = [
        ("Paper", facts["paper"]),
        ("Hooks", ", ".join(f"`{h}`" for h in facts["hooks"])),
        ("Needs", ", ".join(facts["needs"])),
    ]
    parts.append("\n".join(f"- {title}: {text}" for title, text in about if text))
    if facts["fields"]:
        rows = [
            f"| `{f['name']}` | {_cell(f['type'])}{', ' + f['constraints'] if f['constraints'] else ''} | "
            f"{_value(f['default'])} | {_cell(f['doc'])} |"
            for f in facts["fields"]
        ]
        parts.append(
            "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
        )
    check = facts["check"]
    if check is not None:
        parts.append(
            f"Row {check['row']}. {check['claim']} Control: {check['control']}. Data: {check['data']}. "
            f"Reproduced: {check['reproduced']}."
        )
    return "\n\n".join(parts)


def _plain(doc: str) -> str:
    """A docstring as Markdown: its indented blocks as code."""
    out, inside = [], False
    for line in doc.rstrip().splitlines():
        code = line.startswith("    ")
        if code and not inside:
            out.append("```text")
        elif inside and not code and line.strip():
            while out and not out[-1].strip():
                out.pop()
            out += ["```", ""]
        inside = code or (inside and not line.strip())
        out.append(line[4:] if code else line.replace("::", ":").replace("``", "`"))
    if inside:
        out.append("```")
    return "\n".join(out)


def _value(default: Any) -> str:
    return "required" if default is None else f"`{literal(default)}`"


def _needs(facts: dict[str, Any]) -> str:
    return ", ".join(facts["needs"]) or "–"


def _claim(facts: dict[str, Any]) -> str:
    check = facts["check"]
    return f"row {check['row']}: {check['reproduced']}" if check else "–"


if __name__ == "__main__":
    for name, text in pages().items():
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{len(pages())} pages written\n")
