"""What ``farflung-site doctor`` looks at: everything that is known to go wrong at a site."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

from protos.distribution import check_distribution
from protos.errors import FarflungError
from site_agent.config import SiteConfig
from site_agent.home import Home

LEAST_DISK_BYTES = 2 * 10**9
TASK_S = 120.0


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        about: What.
        state: ok, warning (it works, but) or failed.
        message: What was found, and what to do where it is not ok.
    """

    about: str
    state: Literal["ok", "warning", "failed"]
    message: str


def examine(home: Home) -> list[Finding]:
    """Look at the installation and at a site's folder."""
    findings: list[Finding] = []
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", _installation),
        ("folder", lambda: _folder(home)),
        ("certificate", lambda: _certificate(home)),
        ("orchestrator", lambda: _orchestrator(home)),
        ("tasks", lambda: _tasks(home)),
        ("disk", lambda: _disk(home)),
    ]
    for about, check in checks:
        try:
            findings += check()
        except FarflungError as error:
            findings.append(Finding(about, "failed", error.message))
        except (OSError, ValueError) as error:
            findings.append(Finding(about, "failed", f"can't be looked at: {error}"))
    return findings


def _installation() -> Iterator[Finding]:
    yield Finding("python", "ok", sys.version.split()[0])
    yield Finding("packages", "ok", f"all from {check_distribution()}")
    for name in ("torch", "grpcio", "protobuf", "cryptography"):
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "failed", "not installed; install it: pip install farflung")


def _folder(home: Home) -> Iterator[Finding]:
    home.need_joined()
    yield Finding("folder", "ok", str(home.root))
    for path in (home.keys, home.keys / "key.pem"):
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            fix = "700" if path.is_dir() else "600"
            yield Finding(
                "permissions",
                "failed",
                f"{path} can be read by others (mode {mode:o}); do `chmod {fix} {path}`",
            )
    config = SiteConfig.load(home.config)
    yield Finding("configuration", "ok", f"{home.config} ({len(config.tasks)} tasks)")
    if config.policy.condensed_data:
        yield Finding(
            "policy",
            "warning",
            "condensed_data = true: examples made from this site's data may leave, look like it, "
            "and can't be called back",
        )
    from site_agent.link.network import Network, in_words

    yield Finding("network", "ok", in_words(Network(config.network).facts()))


def _certificate(home: Home) -> Iterator[Finding]:
    if not home.joined:
        return
    from site_agent.link.keys import Keys

    keys = Keys.load(home.keys)
    left = keys.expires - datetime.now(UTC)
    who = f"{keys.site} in {keys.federation}"
    if left < timedelta(0):
        message = f"{who}: ended {keys.expires:%Y-%m-%d}; ask the operator for a new join token"
        yield Finding("certificate", "failed", message)
    elif keys.renewal_due():
        message = f"{who}: ends {keys.expires:%Y-%m-%d}; a running agent would have renewed it"
        yield Finding("certificate", "warning", message)
    else:
        yield Finding("certificate", "ok", f"{who}, until {keys.expires:%Y-%m-%d}")


def _orchestrator(home: Home) -> Iterator[Finding]:
    if not home.joined:
        return
    from site_agent.link.keys import Keys
    from site_agent.link.wire import Wire

    keys, config = Keys.load(home.keys), SiteConfig.load(home.config)
    wire = Wire(lambda: keys, config.network)
    problem = wire.diagnose()
    if problem is not None:
        yield Finding("orchestrator", "failed", problem.message)
    else:
        yield Finding("orchestrator", "ok", f"{wire.address} answers and accepts the certificate")


def _tasks(home: Home) -> Iterator[Finding]:
    config = SiteConfig.load(home.config)
    if not config.tasks:
        yield Finding("tasks", "warning", f"none; name one in {home.config}")
    there = []
    for name, source in config.sources(home.root).items():
        if source.file is None:
            yield Finding("task", "failed", f"{name}: {source.place} is not there")
        else:
            there.append((name, source.text))
    if there:
        yield from _importable(there, home)


IMPORT = """
import sys
from pathlib import Path
from strategies.loading import task_class

for name, source in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        task_class(name, source, Path())
    except Exception as error:
        print(name, f"{type(error).__name__}: {error}".replace("\\n", " "), flush=True)
    else:
        print(name, flush=True)
"""


def _importable(tasks: list[tuple[str, str]], home: Home) -> Iterator[Finding]:
    """Import the tasks' modules in another process: they may do anything, also end it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", IMPORT, *(word for task in tasks for word in task)],
            cwd=home.root,
            capture_output=True,
            text=True,
            timeout=TASK_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        names = ", ".join(name for name, _ in tasks)
        yield Finding("task", "warning", f"{names}: importing takes longer than {TASK_S:g} s")
        return
    # What a module prints has no name of a task at its beginning, or does no harm.
    said = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    for name, _ in tasks:
        if name not in said:
            yield Finding("task", "failed", f"{name}: its import ends the process")
        elif said[name]:
            yield Finding("task", "failed", f"{name}: can't be imported: {said[name]}")
        else:
            hint = f"`farflung-site task test {name}` trains one step"
            yield Finding("task", "ok", f"{name}: can be imported; {hint}")


def _disk(home: Home) -> Iterator[Finding]:
    place = home.root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    state: Literal["ok", "warning"] = "ok" if free >= LEAST_DISK_BYTES else "warning"
    yield Finding("disk", state, f"{free / 1e9:.1f} GB free at {place}")
