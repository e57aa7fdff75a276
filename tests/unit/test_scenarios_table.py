"""The table of docs/scenarios.md: at least sixty rows, and each names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| (\d+) \| (.+?) \| (.+?) \| `(tests/)?(\S+?)::(\S+?)` \|$",
    (ROOT / "docs" / "scenarios.md").read_text(),
    flags=re.MULTILINE,
)


def test_there_are_sixty_scenarios_numbered_through() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert len(ROWS) >= 60


def test_each_names_a_test_of_its_own_that_is_there() -> None:
    named = [(file, test) for *_, file, test in ROWS]
    assert len(set(named)) == len(named)
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert test in there, f"{file} has no {test}"


def test_the_ten_failures_of_the_field_are_among_them() -> None:
    words = " ".join(f"{what} {read}" for _, what, read, *_ in ROWS)
    assert {int(number) for number in re.findall(r"\bF(\d+)\b", words)} == set(range(1, 11))


def test_every_scenario_that_is_tested_is_listed() -> None:
    listed = {test for *_, test in ROWS}
    for file in (ROOT / "tests" / "scenarios").glob("test_*.py"):
        tests = re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)
        assert set(tests) <= listed, set(tests) - listed
