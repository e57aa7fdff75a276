"""What `farflung doctor` looks at: everything that is known to go wrong, without changing anything."""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

from orchestrator.home import Home, split_address
from protos.distribution import check_distribution
from protos.errors import FarflungError, HomeLocked, Unavailable

LEAST_DISK_BYTES = 2 * 10**9
LEAST_SHARED_MEMORY_BYTES = 128 * 2**20
CERTIFICATE_WARNING = timedelta(days=60)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


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


def examine(path: Path) -> list[Finding]:
    """Look at the installation and at a home."""
    home = Home(path)
    findings = [*_installation()]
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("home", lambda: _folder(home)),
        ("keys", lambda: _keys(home)),
        ("store", lambda: _store(home)),
        ("daemon", lambda: _daemon(home)),
        ("disk", lambda: _disk(home.path)),
        ("data", _data),
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
    try:
        yield Finding("packages", "ok", f"all from {check_distribution()}")
    except FarflungError as error:
        yield Finding("packages", "failed", error.message)
    for name in (
        "torch",
        "grpcio",
        "ray",
        "sqlalchemy",
        "alembic",
        "starlette",
        "uvicorn",
        "obstore",
    ):
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            hint = "install it: pip install 'farflung[orchestrator]'"
            yield Finding(name, "failed", f"not installed; {hint}")


def _folder(home: Home) -> Iterator[Finding]:
    if not home.config_file.exists():
        yield Finding("home", "warning", f"{home.path} is not there yet; `farflung init` makes one")
        return
    yield Finding("home", "ok", str(home.path))
    for folder in (home.keys, home.run):
        mode = folder.stat().st_mode & 0o777
        if mode & 0o077:
            yield Finding(
                "permissions",
                "failed",
                f"{folder} can be read by others (mode {mode:o}); do `chmod 700 {folder}`",
            )
    key_mode = (home.keys / "ca.key").stat().st_mode & 0o777
    if key_mode & 0o077:
        yield Finding(
            "permissions",
            "failed",
            f"the authority's key can be read by others (mode {key_mode:o}); "
            f"do `chmod 600 {home.keys / 'ca.key'}`",
        )
    yield Finding("configuration", "ok", f"{home.config_file} ({len(home.config.tasks)} tasks)")


def _keys(home: Home) -> Iterator[Finding]:
    if not home.config_file.exists():
        return
    _, certificate = home.authority()
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    if left < timedelta(0):
        yield Finding("authority", "failed", f"its certificate ended {until}; make a new home")
    elif left < CERTIFICATE_WARNING:
        yield Finding("authority", "warning", f"its certificate ends {until}; plan for a new home")
    else:
        yield Finding("authority", "ok", f"valid until {until}")


def _store(home: Home) -> Iterator[Finding]:
    section = home.config.store if home.config_file.exists() else None
    if section is None or not section.url:
        return
    if section.credentials and Path(section.credentials).stat().st_mode & 0o077:
        yield Finding(
            "permissions",
            "failed",
            f"{section.credentials} can be read by others; do `chmod 600 {section.credentials}`",
        )
    from orchestrator.store.bucket import owner_of

    owner = owner_of(section)
    if owner not in ("", home.federation):
        yield Finding(
            "store",
            "failed",
            f"{section.url} is another federation's ({owner}); change [store] url",
        )
        return
    new = "" if owner else "; nothing is in it yet, and whether it can be written is not known"
    yield Finding("store", "ok", f"{section.url} answers{new}")


def _daemon(home: Home) -> Iterator[Finding]:
    if not home.config_file.exists():
        return
    from orchestrator.client import OperatorClient

    try:
        with OperatorClient(home.path) as client:
            daemon = client.status()
    except Unavailable:
        yield from _not_running(home)
        return
    yield Finding("daemon", "ok", f"{daemon.attached} of {daemon.sites} sites at {daemon.address}")
    kind: Literal["ok", "warning", "failed"] = "failed" if daemon.compute == "failed" else "ok"
    yield Finding("compute", kind, f"{daemon.compute} {daemon.compute_detail}".strip())
    for site in client_sites(home):
        if site[1] is not None and site[1] < CERTIFICATE_WARNING.total_seconds() / 4:
            yield Finding(
                "certificate", "warning", f"{site[0]}: ends in {site[1] / 86400:.0f} days"
            )


def client_sites(home: Home) -> list[tuple[str, float | None]]:
    """Each site, with the seconds for which its certificate is still valid."""
    from orchestrator.client import OperatorClient

    now = datetime.now(UTC).timestamp()
    with OperatorClient(home.path) as client:
        return [
            (s.name, None if s.certificate_expires is None else s.certificate_expires - now)
            for s in client.sites()
            if s.state != "revoked"
        ]


def _not_running(home: Home) -> Iterator[Finding]:
    try:
        home.lock().close()
    except HomeLocked as error:
        yield Finding("daemon", "failed", f"it does not answer: {error.message}")
        return
    yield Finding("daemon", "warning", "not running; start it with `farflung serve`")
    config = home.config
    addresses = [config.listen.bind]
    if config.gateways.processes:
        addresses.append(config.gateways_bind)
    if config.dashboard.port > 0:
        addresses.append(f"{config.dashboard.host}:{config.dashboard.port}")
    for address in addresses:
        host, port = split_address(address)
        try:
            with socket.create_server((host, port), family=_family(host)):
                pass
        except OSError as error:
            yield Finding("port", "failed", f"{address} can't be bound: {error.strerror}")
        else:
            yield Finding("port", "ok", f"{address} is free")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _disk(path: Path) -> Iterator[Finding]:
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    enough = free >= LEAST_DISK_BYTES
    yield Finding("disk", "ok" if enough else "warning", f"{free / 1e9:.1f} GB free at {place}")
    shared = Path("/dev/shm")  # noqa: S108  # Ray's, not ours
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        enough = free >= LEAST_SHARED_MEMORY_BYTES
        hint = "" if enough else "; Ray wants 128 MB (containers: --shm-size)"
        yield Finding(
            "shared memory", "ok" if enough else "warning", f"{free / 1e6:.0f} MB free{hint}"
        )


def _data() -> Iterator[Finding]:
    if (FASHION_MNIST / "train-images-idx3-ubyte.gz").is_file():
        yield Finding("Fashion-MNIST", "ok", str(FASHION_MNIST))
    else:
        yield Finding(
            "Fashion-MNIST",
            "warning",
            "not installed, the demo takes digits; `apt-get install dataset-fashion-mnist` "
            "brings it",
        )
