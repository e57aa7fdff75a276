"""The shape of the repository, as docs/architecture.md draws it."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = {
    "orchestrator", "site_agent", "protos", "strategies", "deploy", "tests", "docs", "benchmarks",
    "farflung.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "CHANGELOG.md",
    "CONTRIBUTING.md", "SECURITY.md", "LICENSE", ".ci", ".gitignore", ".gitattributes",
    ".editorconfig",
}  # fmt: skip
# Names that say nothing: whatever is in such a file has a home of its own.
NOTHING_SAID = {"utils", "util", "common", "helpers", "misc"}
LONGEST = 400


def tracked() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    # A file that is deleted but not yet committed is still listed.
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def sources() -> list[Path]:
    """The hand-written Python files of the distribution."""
    packages = {"orchestrator", "site_agent", "protos", "strategies", "farflung.py"}
    return [
        path
        for path in tracked()
        if path.parts[0] in packages
        and path.suffix == ".py"
        and not path.stem.endswith(("_pb2", "_pb2_grpc"))
    ]


def test_top_level_is_the_given_one() -> None:
    assert {path.parts[0] for path in tracked()} <= TOP


def test_no_file_or_folder_says_nothing() -> None:
    assert [p for p in sources() if NOTHING_SAID & {*p.parent.parts, p.stem}] == []


def test_no_class_is_a_manager() -> None:
    found = [
        f"{path}: {node.name}"
        for path in sources()
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Manager")
    ]
    assert found == []


def test_no_file_has_grown_a_second_noun() -> None:
    lengths = {
        str(path): len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in sources()
    }
    assert {path: n for path, n in lengths.items() if n > LONGEST} == {}


@pytest.mark.parametrize("name", ["constraints.txt"])
def test_constraints_are_exact(name: str) -> None:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins
    assert [pin for pin in pins if pin.count("==") != 1 or "+" in pin or "@" in pin] == []
