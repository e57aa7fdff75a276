"""A run file as the operator's end of `launch` reads it, before the daemon sees it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from orchestrator.run_config import RunConfig, parse_run
from protos.errors import NotFound

WEIGHTS = ".safetensors"


class Launch(NamedTuple):
    """What `OperatorClient.launch` takes.

    Attributes:
        config: The run file's text.
        start_from: Start that replaces the file's own; empty if there is none.
        start_file: Bytes of the file that the run starts from; empty if it starts otherwise.
    """

    config: str
    start_from: str
    start_file: bytes


def read_run_file(path: Path, start: str = "") -> Launch:
    """Read and check a run file, and the weights that it starts from.

    Args:
        path: The run file. Weights that it names are looked for from its folder.
        start: Start that replaces the file's own; a path in it is relative to the working folder.

    Raises:
        NotFound: One of the files is not there.
        ConfigInvalid: The run file is not valid; names the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise NotFound(f"run file {path}: {error.strerror}", file=str(path)) from None
    config = parse_run(text, str(path))
    return Launch(text, start, start_bytes(config, start, path.parent))


def start_bytes(config: RunConfig, start: str, folder: Path) -> bytes:
    """Bytes of the safetensors file that a run starts from; empty if it starts otherwise."""
    chosen = start or config.init.start
    if not chosen.endswith(WEIGHTS):
        return b""
    where = Path(chosen).expanduser()
    where = where if start else folder / where
    try:
        return where.read_bytes()
    except OSError as error:
        key = "--from" if start else "init.from"
        raise NotFound(f"{key}: {where}: {error.strerror}", file=str(where)) from None
