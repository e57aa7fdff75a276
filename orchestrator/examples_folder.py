"""Where the example tasks are: in the wheel, or beside the packages in a checkout."""

from __future__ import annotations

from pathlib import Path

from protos.errors import NotFound

PACKAGES = Path(__file__).resolve().parent


def examples_folder() -> Path:
    """The folder with ``images.py``, ``fashion-mnist/``, ``digits/`` and ``lora/``.

    Raises:
        NotFound: This installation came without them.
    """
    for folder in (PACKAGES / "examples", PACKAGES.parent / "deploy" / "examples"):
        if (folder / "images.py").is_file():
            return folder
    raise NotFound("the example tasks are not in this installation; install Farflung again")
