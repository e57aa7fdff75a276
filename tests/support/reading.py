"""What an operator reads: the commands as they are typed, and the page."""

from __future__ import annotations

import io
import subprocess
import urllib.request
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from orchestrator.child import program
from orchestrator.cli.app import code_of
from orchestrator.federation import Federation


@dataclass(frozen=True)
class Reading:
    """What a command said.

    Attributes:
        code: How it ended.
        text: Both its outputs, on one line: a table folds its columns.
    """

    code: int
    text: str


def farflung(federation: Federation, *words: str) -> Reading:
    """A command on the daemon's home, run here: a process of its own costs a second for each."""
    out, home = io.StringIO(), str(federation.home.path)
    with redirect_stdout(out), redirect_stderr(out):
        code = code_of([*words, "--home", home])
    return Reading(code, " ".join(out.getvalue().split()))


def serving(federation: Federation) -> Reading:
    """A further `farflung serve`, which is expected to end."""
    home = str(federation.home.path)
    command = [*program("farflung", "orchestrator.cli"), "serve", "--home", home]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return Reading(done.returncode, " ".join((done.stdout + done.stderr).split()))


def launching(federation: Federation, run: str) -> Reading:
    """What `farflung launch --follow` says in the end, and how it ends: `watch` is the same code."""
    return farflung(federation, "watch", run)


def page(federation: Federation, run: str) -> str:
    """What the page shows of a run's rounds."""
    address = f"{federation.client.status().dashboard}api/runs/{run}/rounds"
    with urllib.request.urlopen(address) as answer:
        return answer.read().decode()  # type: ignore[no-any-return]
