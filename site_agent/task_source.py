"""Where a task's code is: ``path.py:Class`` or ``module:Class``, found without importing it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from protos.digest import digest
from protos.errors import ConfigInvalid


@dataclass(frozen=True)
class TaskSource:
    """A class in a file or in an installed module.

    Attributes:
        place: An absolute path that ends in ``.py``, or a dotted module name.
        cls: The class in it.
    """

    place: str
    cls: str

    @classmethod
    def parse(cls, text: str, folder: Path, key: str = "source") -> TaskSource:
        """The source that a configuration names.

        Args:
            text: ``path.py:Class`` or ``module:Class``.
            folder: What relative paths are relative to.
            key: The configuration key, for the error.

        Raises:
            ConfigInvalid: It has neither form.
        """
        place, _, name = text.rpartition(":")
        if not place or not name.isidentifier():
            raise ConfigInvalid(
                f'{key}: {text!r} must be "path.py:Class" or "module:Class"', key=key
            )
        if place.endswith(".py"):
            return cls(str((folder / Path(place).expanduser()).resolve()), name)
        if not all(part.isidentifier() for part in place.split(".")):
            raise ConfigInvalid(f"{key}: {place!r} is neither a .py file nor a module", key=key)
        return cls(place, name)

    @property
    def text(self) -> str:
        """The form that ``parse`` reads."""
        return f"{self.place}:{self.cls}"

    @property
    def is_file(self) -> bool:
        """Whether it is named by its path."""
        return self.place.endswith(".py")

    @property
    def file(self) -> Path | None:
        """The source file; None if it isn't there."""
        if self.is_file:
            path = Path(self.place)
            return path if path.is_file() else None
        # Only the top package's place is asked for: `find_spec("a.b")` would import `a`.
        top, *rest = self.place.split(".")
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        if not rest:
            return Path(spec.origin) if spec.origin else None
        for root in spec.submodule_search_locations or ():
            for name in (Path(*rest).with_suffix(".py"), Path(*rest) / "__init__.py"):
                if (Path(root) / name).is_file():
                    return Path(root) / name
        return None

    @property
    def digest(self) -> str:
        """Digest of the source file; empty if it isn't there."""
        file = self.file
        return digest(file.read_bytes()) if file else ""
