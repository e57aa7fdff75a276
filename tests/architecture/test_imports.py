"""Who may import whom: the written contracts, and what really gets loaded in a process.

import-linter reads the imports that are written down, also inside functions. It does not see what
a parent package's `__init__` drags in, nor what another library imports; a fresh interpreter does.
"""

import ast
import os
import re
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = Path(sys.executable).parent
HEAVY = frozenset({"torch", "ray", "sqlalchemy", "alembic", "pandas", "sklearn", "matplotlib"})


def loaded_by(command: list[str | Path]) -> set[str]:
    """Every module that Python loads while it runs `command`, which has to succeed."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    modules = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert "site" in modules, "no import was recorded: does this interpreter profile its imports?"
    return modules


def roots(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def test_contracts_of_import_linter() -> None:
    done = subprocess.run(
        [COMMANDS / "lint-imports", "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", ["farflung", "farflung-site"])
def test_help_loads_nothing_heavy(command: str) -> None:
    assert roots(loaded_by([COMMANDS / command, "--help"])) & HEAVY == set()


@pytest.mark.parametrize("command", ["farflung", "farflung-site"])
def test_help_takes_under_half_a_second_of_cpu(command: str) -> None:
    """The best of five: other work on the machine makes a process slower, never faster."""
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([COMMANDS / command, "--help"], cwd=ROOT, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if spent[-1] < 0.5:
            break
    assert min(spent) < 0.5


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("site_agent.link", {"torch", "ray"}),
        ("site_agent.trainer", {"grpc", "cryptography", "ray"}),
        ("strategies", {"grpc", "cryptography", "ray"}),
        ("protos", {"ray"}),
        ("farflung", {"grpc", "cryptography", "ray"}),
    ],
)
def test_importing_a_whole_package_does_not_load(module: str, absent: set[str]) -> None:
    """The package and every module in it, in one fresh interpreter."""
    script = f"""
import importlib, pkgutil
package = importlib.import_module({module!r})
for found in pkgutil.walk_packages(getattr(package, "__path__", []), {module!r} + "."):
    if not found.name.endswith(".__main__"):
        importlib.import_module(found.name)
"""
    assert roots(loaded_by([sys.executable, "-c", script])) & absent == set()


def imported_in(file: Path) -> set[str]:
    """The top-level names of all that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_the_facade_imports_only_strategies_and_protos() -> None:
    """import-linter takes packages only, and `farflung` is one module."""
    assert imported_in(ROOT / "farflung.py") - sys.stdlib_module_names <= {"strategies", "protos"}


def test_the_facade_exports_what_it_says() -> None:
    import farflung

    assert sorted(farflung.__all__) == sorted(set(farflung.__all__))
    for name in farflung.__all__:
        assert getattr(farflung, name).__doc__, f"farflung.{name} says nothing about itself"
    assert {"Task", "Strategy"} <= set(farflung.__all__)


def test_examples_are_written_against_the_facade_alone() -> None:
    """What an author of tasks copies from must not reach behind the door."""
    inside = {"orchestrator", "site_agent", "strategies", "protos"}
    examples = sorted((ROOT / "deploy/examples").rglob("*.py"))
    assert examples
    for example in examples:
        assert imported_in(example) & inside == set(), example


def test_what_is_imported_is_declared() -> None:
    """No package works only because another one happened to bring its dependency along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    base = declared(project["dependencies"])
    extra = base | declared(project["optional-dependencies"]["orchestrator"])
    allowed = {"protos": base, "strategies": base, "site_agent": base, "orchestrator": extra}
    ours = {"farflung", *allowed}
    for package, names in allowed.items():
        for file in sorted((ROOT / package).rglob("*.py")):
            foreign = imported_in(file) - sys.stdlib_module_names - ours
            assert foreign <= names, f"{file.relative_to(ROOT)} imports {foreign - names}"


def declared(requirements: list[str]) -> set[str]:
    """Import names of requirements; the distributions here that are named otherwise are listed."""
    names = {re.split(r"[^A-Za-z0-9_.-]", item, maxsplit=1)[0] for item in requirements}
    renamed = {"grpcio": "grpc", "protobuf": "google"}
    return {renamed.get(name, name.replace("-", "_")) for name in names}


def test_the_daemon_holds_no_tensors_and_no_code_of_tasks() -> None:
    """ADR 0009: whatever needs torch runs in the compute process."""
    loaded = loaded_by([sys.executable, "-c", "import orchestrator.daemon"])
    assert not roots(loaded) & {"torch", "ray", "strategies"}
    assert not [m for m in loaded if m.startswith("orchestrator.arithmetic.")]
