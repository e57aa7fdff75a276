"""The site's folder: where each file is, and the lock that lets one agent use it."""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from protos.errors import HomeLocked, NotFound
from protos.faults import reach
from protos.spares import Spares

DEFAULT_HOME = Path("~/.farflung-site")
SPARES = 2
HOME_VARIABLE = "FARFLUNG_SITE_HOME"


@dataclass(frozen=True)
class Home:
    """The files of a site agent, by name.

    Args:
        root: The folder itself.
    """

    root: Path

    @classmethod
    def at(cls, path: Path | None = None) -> Home:
        """The home at a path, else at $FARFLUNG_SITE_HOME, else at ``~/.farflung-site``."""
        chosen = path or Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
        return cls(chosen.expanduser().absolute())

    @property
    def config(self) -> Path:
        """``site.toml``."""
        return self.root / "site.toml"

    @property
    def keys(self) -> Path:
        """Private key and certificates (mode 0700)."""
        return self.root / "keys"

    @cached_property
    def cache(self) -> Path:
        """Bases and frozen parts that were fetched."""
        return self.root / "cache"

    @cached_property
    def contributions(self) -> Path:
        """The outbox and the site's states: one folder a contribution, named by its digest."""
        return self.root / "contributions"

    @cached_property
    def work(self) -> Path:
        """Contributions in the making; emptied at every start."""
        return self.root / "work"

    @property
    def checkpoint(self) -> Path:
        """Training of the plan in work, saved half-way; gone when its contribution is finished."""
        return self.root / "checkpoint.safetensors"

    @property
    def paused(self) -> Path:
        """There while the site takes no plans, also over a restart."""
        return self.root / "paused"

    def spares(self) -> Spares:
        """Files to write over: the payload that was sent, the base that is not needed any more."""
        return Spares(self.root / "spare", SPARES)

    @property
    def log(self) -> Path:
        """Logs."""
        return self.root / "log"

    @property
    def agent_log(self) -> Path:
        """The agent's log: one line of JSON each."""
        return self.log / "agent.log"

    @property
    def trainer_log(self) -> Path:
        """What the trainer, and the task in it, print."""
        return self.log / "trainer.log"

    @property
    def sent_log(self) -> Path:
        """What left this site: one line of JSON each."""
        return self.root / "sent.log"

    @property
    def lock_file(self) -> Path:
        """Held by the one agent that uses this folder."""
        return self.root / "lock"

    @property
    def socket(self) -> Path:
        """Where a running agent answers ``farflung-site status`` and its kin (mode 0600)."""
        return self.root / "agent.sock"

    @property
    def joined(self) -> bool:
        """Whether the site has a certificate."""
        return (self.keys / "identity.json").exists()

    def create(self) -> None:
        """Make the folders that are missing."""
        for folder in (self.root, self.cache, self.contributions, self.work, self.log):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def need_joined(self) -> None:
        """Check that the site has a certificate.

        Raises:
            NotFound: It never joined a federation.
        """
        if not self.joined:
            raise NotFound(
                f"{self.root}: this site is not in a federation yet; ask the operator for a join "
                "token and run `farflung-site join TOKEN`"
            )


class HomeLock:
    """Keeps other agents out of a home for as long as this process holds it.

    Args:
        home: The home.

    Raises:
        HomeLocked: Another process holds it.
    """

    def __init__(self, home: Home) -> None:
        home.create()
        self._file = home.lock_file.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise HomeLocked(
                f"{home.root}: another agent (process {holder}) uses this folder; stop it first, "
                "or give this one a folder of its own with --home",
                home=str(home.root),
            ) from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        reach("home.locked")

    def release(self) -> None:
        """Let others in."""
        self._file.close()

    def __enter__(self) -> HomeLock:
        """For ``with``."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release."""
        self.release()
