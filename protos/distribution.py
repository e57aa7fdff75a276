"""Do the four packages come from this distribution? Their names are generic, so a clash must be loud."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from urllib.parse import unquote, urlsplit

from protos.errors import ConfigInvalid

NAME = "farflung"
MODULES = ("farflung", "orchestrator", "protos", "site_agent", "strategies")


def check_distribution() -> str:
    """Check that every one of our modules is the one that was installed with this distribution.

    Nothing is imported for it.

    Returns:
        Where they come from.

    Raises:
        ConfigInvalid: Another project's folder of the same name comes first, or Farflung is not
            installed.
    """
    try:
        distribution = importlib.metadata.distribution(NAME)
    except importlib.metadata.PackageNotFoundError:
        raise ConfigInvalid(
            "Farflung is not installed in this Python; run `pip install farflung`", key="python"
        ) from None
    root = _root(distribution)
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        places = [spec.origin] if spec and spec.origin else []
        if spec is not None and spec.submodule_search_locations:
            places = list(spec.submodule_search_locations)
        found = [Path(place).resolve() for place in places if place]
        if not found:
            raise ConfigInvalid(f"the package {module} of Farflung is missing; install it again")
        if any(root not in place.parents for place in found):
            raise ConfigInvalid(
                f"{module} is {found[0]}, which is not Farflung's (that is in {root}); another "
                "folder or distribution of this name comes first on Python's path",
                key=module,
            )
    return str(root)


def _root(distribution: importlib.metadata.Distribution) -> Path:
    """The folder that holds the modules: the checkout where it is an editable installation."""
    origin = distribution.read_text("direct_url.json")
    if origin:
        described = json.loads(origin)
        if described.get("dir_info", {}).get("editable"):
            return Path(unquote(urlsplit(described["url"]).path)).resolve()
    return Path(str(distribution.locate_file(""))).resolve()
