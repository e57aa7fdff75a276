"""What the wheel ships, and that it works where nothing of the checkout is on the path.

The wheel goes into an empty environment. Its dependencies are not downloaded again: a .pth file
puts this environment's packages behind the new ones. Python does not read .pth files found in
there, so the editable installation of the checkout stays out of reach.
"""

import json
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "protos", "site_agent", "strategies")
NAMES = (*PACKAGES, "farflung")
# Everything in a package folder belongs to the wheel but what Python leaves there.
DATA = (
    ("protos", "*.proto"),
    ("protos", "*.pyi"),
    ("orchestrator/ledger/migrations", "*"),
    ("orchestrator/dashboard/static", "*"),
)

pytestmark = [pytest.mark.timeout(300), pytest.mark.xdist_group("wheel")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built with the backend that is installed here."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def shipped(wheel: Path) -> frozenset[str]:
    with zipfile.ZipFile(wheel) as archive:
        return frozenset(name for name in archive.namelist() if not name.endswith("/"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; the folder that holds its commands."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, system_site_packages=False, symlinks=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--isolated"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (site_packages,) = home.glob("lib/python*/site-packages")
    dependencies = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return home / "bin"


def run(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command as somebody would who has never seen the checkout."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "LANG": "C.UTF-8"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_nothing_else_is_shipped_at_top_level(shipped: frozenset[str]) -> None:
    top = {name.split("/")[0] for name in shipped}
    (information,) = (name for name in top if name.endswith(".dist-info"))
    assert information.startswith("farflung-")
    assert top - {information} == {*PACKAGES, "farflung.py"}


def test_no_rubbish_is_shipped(shipped: frozenset[str]) -> None:
    bad = ("__pycache__", ".pyc", ".DS_Store", ".sqlite", ".key", ".pem")
    assert [name for name in shipped if any(part in name for part in bad)] == []


@pytest.mark.parametrize(("folder", "pattern"), DATA)
def test_package_data_is_shipped(shipped: frozenset[str], folder: str, pattern: str) -> None:
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / folder).rglob(pattern)
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert here, f"no {pattern} in {folder}/"
    assert here <= shipped


def test_the_examples_that_the_demo_runs_are_shipped(shipped: frozenset[str]) -> None:
    """They lie in deploy/, and go into the wheel beside the code that reads them."""
    done = subprocess.run(
        ["git", "ls-files", "deploy/examples"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    here = {name.removeprefix("deploy/") for name in done.stdout.splitlines()}
    assert here
    assert {f"orchestrator/{name}" for name in here} <= shipped


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_say_that_they_are_typed(shipped: frozenset[str], package: str) -> None:
    assert f"{package}/py.typed" in shipped


def test_the_licence_is_shipped(shipped: frozenset[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in shipped)


def test_the_five_names_come_from_this_distribution(environment: Path, tmp_path: Path) -> None:
    """Generic names may clash: the installed ones must be ours, and ours alone."""
    script = f"""
import importlib, importlib.metadata as metadata, json
owners = metadata.packages_distributions()
print(json.dumps({{
    name: [importlib.import_module(name).__file__, sorted(set(owners[name]))] for name in {NAMES!r}
}}))
"""
    done = run([str(environment / "python"), "-c", script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in NAMES:
        file, owners = found[name]
        assert Path(file).is_relative_to(environment.parent), f"{name} is not the installed one"
        assert owners == ["farflung"]


@pytest.mark.parametrize("command", ["farflung", "farflung-site"])
def test_the_commands_answer(environment: Path, tmp_path: Path, command: str) -> None:
    done = run([str(environment / command), "--help"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stderr == ""
