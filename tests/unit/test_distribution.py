"""Generic package names: a clash is loud."""

import subprocess
import sys
from pathlib import Path

from protos.distribution import MODULES, check_distribution


def test_here_all_is_well() -> None:
    root = Path(check_distribution())
    assert all((root / name).exists() or (root / f"{name}.py").exists() for name in MODULES)


def test_a_folder_that_comes_first_is_named(tmp_path: Path) -> None:
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").touch()
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from protos.distribution import check_distribution
from protos.errors import ConfigInvalid
try:
    check_distribution()
except ConfigInvalid as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert f"strategies is {tmp_path / 'strategies'}, which is not Farflung's" in done.stdout
