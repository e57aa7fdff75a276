"""``site.toml`` while the agent runs: what is taken up at once, and what waits for a restart."""

from __future__ import annotations

from pathlib import Path

from protos.errors import ConfigInvalid
from site_agent.config import SiteConfig
from site_agent.link.journal import Journal

LIVE_NETWORK = ("up_mbit_per_s", "down_mbit_per_s", "windows")
"""Keys of [network] that need no restart; of the other tables it is all of [policy]."""

Stamp = tuple[int, int, int] | None


class LiveConfig:
    """Notices that the file is another one.

    Args:
        path: The file.
        config: What is in force.
        journal: Log.
    """

    def __init__(self, path: Path, config: SiteConfig, journal: Journal) -> None:
        self._path, self.config, self._journal = path, config, journal
        self._stamp = self._settling = self._stamp_now()
        self._asked = False

    def ask(self) -> None:
        """Read the file at the next look, whatever it looks like; for a signal's handler."""
        self._asked = True

    def look(self) -> bool:
        """Look at the file; whether `config` is another one now.

        A file is read when it looks the same twice: whoever writes it may not have finished. One that
        is wrong, or gone, changes nothing.
        """
        stamp = self._stamp_now()
        settled, self._settling = stamp == self._settling, stamp
        if not self._asked and (stamp == self._stamp or not settled):
            return False
        self._asked, self._stamp = False, stamp
        try:
            if stamp is None:
                raise ConfigInvalid(f"{self._path}: it is not there any more")
            if not stamp[1]:  # somebody is slow to write it; caps must not fall meanwhile
                raise ConfigInvalid(f"{self._path}: it is empty")
            found = SiteConfig.load(self._path)
        except ConfigInvalid as error:
            self._journal.error("site.toml is wrong; what was in force stays", reason=error.message)
            return False
        return self._take(found)

    def _take(self, found: SiteConfig) -> bool:
        before = self.config
        network = {key: getattr(found.network, key) for key in LIVE_NETWORK}
        self.config = before.model_copy(
            update={
                "policy": found.policy,
                "network": before.network.model_copy(update=network),
            }
        )
        taken, waiting = _differences(before, self.config), _differences(self.config, found)
        if taken or waiting:
            self._journal.info("site.toml changed", in_force=taken, needs_a_restart=waiting)
        return bool(taken)

    def _stamp_now(self) -> Stamp:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino


def _differences(one: SiteConfig, other: SiteConfig) -> list[str]:
    """Keys, as "table.key", that differ."""
    out = []
    for table in SiteConfig.model_fields:
        mine, theirs = one.model_dump()[table], other.model_dump()[table]
        keys = sorted({*mine, *theirs})
        out += [f"{table}.{key}" for key in keys if mine.get(key) != theirs.get(key)]
    return out
