"""From a name in a configuration to a task: the only place where a task's code is imported.

A site reads the source from its own ``site.toml``, the orchestrator from its own
``farflung.toml``; neither ever takes code from the other.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from protos.digest import digest
from protos.errors import ConfigInvalid
from protos.plan import first_problem
from strategies.task import Task


def load_task(
    name: str, source: str, params: Mapping[str, Any], settings: Mapping[str, Any], folder: Path
) -> Task:
    """An instance of a task.

    Args:
        name: Its name in plans; for messages.
        source: "path.py:Class" (relative to ``folder``) or "module:Class".
        params: Parameters of the run.
        settings: Settings of this place.
        folder: What relative paths start from.

    Raises:
        ConfigInvalid: The source is not there or not a Task, or a parameter or setting is wrong.
        Exception: Whatever the module raises when it is imported.
    """
    cls = task_class(name, source, folder)
    try:
        typed = cls.Params.model_validate(dict(params))
    except ValidationError as error:
        raise ConfigInvalid(
            f"task {name}: params.{first_problem(error)}", key="task.params"
        ) from None
    try:
        own = cls.Settings.model_validate(dict(settings))
    except ValidationError as error:
        raise ConfigInvalid(
            f"task {name}: settings.{first_problem(error)}", key=f"tasks.{name}.settings"
        ) from None
    return cls(typed, own)


def source_digest(source: str, folder: Path) -> str:
    """Digest of the file that a source names; empty where it can't be found without importing."""
    where, _, _ = source.rpartition(":")
    path = _path(where, folder) if where.endswith(".py") else None
    if path is None:
        try:
            spec = importlib.util.find_spec(where)
        except (ImportError, ValueError):
            return ""
        path = Path(spec.origin) if spec and spec.origin else None
    return digest(path.read_bytes()) if path is not None and path.is_file() else ""


def _path(where: str, folder: Path) -> Path:
    return (folder / Path(where).expanduser()).resolve()


def task_class(name: str, source: str, folder: Path) -> type[Task]:
    """The class that a source names, imported; see ``load_task``.

    Raises:
        ConfigInvalid: The source is not there or not a Task.
        Exception: Whatever the module raises when it is imported.
    """
    where, colon, attribute = source.rpartition(":")
    key = f"tasks.{name}.source"
    if not colon or not where or not attribute:
        raise ConfigInvalid(f'{key}: "{source}" is not "path.py:Class" or "module:Class"', key=key)
    if where.endswith(".py"):
        path = _path(where, folder)
        if not path.is_file():
            raise ConfigInvalid(f"{key}: there is no file {path}", key=key)
        module_name = f"farflung_task_{digest(str(path).encode())[:12]}"
        module = sys.modules.get(module_name)
        if module is None:
            spec = importlib.util.spec_from_file_location(module_name, path)
            if spec is None or spec.loader is None:
                raise ConfigInvalid(f"{key}: {path} can't be imported", key=key)
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            sys.path.insert(0, str(path.parent))  # a task may import what lies beside it
            try:
                spec.loader.exec_module(module)
            except BaseException:
                del sys.modules[module_name]
                raise
            finally:
                sys.path.remove(str(path.parent))
    else:
        module = importlib.import_module(where)
    cls = getattr(module, attribute, None)
    if not isinstance(cls, type) or not issubclass(cls, Task):
        raise ConfigInvalid(
            f"{key}: {attribute} in {where} is not a subclass of farflung.Task", key=key
        )
    return cls
