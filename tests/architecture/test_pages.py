"""The generated pages say what the code says."""

from __future__ import annotations

from pathlib import Path

from docs.generate import HERE, pages


def test_the_pages_are_those_that_make_docs_writes() -> None:
    written = pages()
    stale = [name for name, text in written.items() if _read(HERE / name) != text]
    assert stale == [], "run `make docs`"
    left = {f"strategies/{path.name}" for path in (HERE / "strategies").glob("*.md")}
    assert left <= set(written), "pages of families that are no more"


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""
