"""A federation whose processes may each have surroundings of their own: variables, mounts, a clock."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.child import Child
from tests.support.faulty import FaultyFederation

needs_mounts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="mounting file systems takes root and util-linux",
)


class RiggedFederation(FaultyFederation):
    """See the module.

    Attributes:
        before: Words that stand before the command of a process, by its name.
        variables: Further variables of a process, by its name.
    """

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.before: dict[str, list[str]] = {}
        self.variables: dict[str, dict[str, str]] = {}

    def _start(self, name: str, command: Sequence[str]) -> Child:
        return super()._start(name, [*self.before.get(name, ()), *command])

    def _variables(self, name: str) -> dict[str, str]:
        return {**super()._variables(name), **self.variables.get(name, {})}


def with_mounts(*commands: str) -> list[str]:
    """What stands before a command so that it sees mounts that nobody else does."""
    unshare = shutil.which("unshare") or "unshare"
    script = " && ".join([*commands, 'exec "$@"'])
    return [unshare, "--mount", "/bin/sh", "-c", script, "sh"]
