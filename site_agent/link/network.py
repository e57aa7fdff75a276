"""What the site's line may carry now: [network] of site.toml, and the clock on the wall."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from site_agent.config import MBIT_BYTES, Allowance, NetworkSection
from site_agent.link.throttle import Throttle


def local_now() -> datetime:
    """The time on this machine's wall."""
    return datetime.now().astimezone()


class Network:
    """Caps and windows as they are at the moment.

    Args:
        section: [network].
        now: Local time, with its zone.

    Attributes:
        up: Pace towards the orchestrator.
        down: Pace from it.
        allowance: What is allowed.
    """

    def __init__(self, section: NetworkSection, now: Callable[[], datetime] = local_now) -> None:
        self._section, self._now = section, now
        self.up, self.down = Throttle(), Throttle()
        self.allowance = section.at(now())
        self._set()

    def apply(self, section: NetworkSection) -> None:
        """Caps and windows are others from the next look on; address and name stay."""
        self._section = section

    def look(self) -> tuple[Allowance, Allowance]:
        """Look at the clock; what was allowed before, and what is now."""
        before, self.allowance = self.allowance, self._section.at(self._now())
        self._set()
        return before, self.allowance

    def _set(self) -> None:
        self.up.cap = self.allowance.up_mbit_per_s * MBIT_BYTES
        self.down.cap = self.allowance.down_mbit_per_s * MBIT_BYTES

    @property
    def is_open(self) -> bool:
        """Whether models and contributions may move."""
        return self.allowance.is_open

    @property
    def is_paced(self) -> bool:
        """Whether there is a pace to be kept in any direction."""
        return bool(self.up.bytes_per_s or self.down.bytes_per_s)

    @property
    def opens(self) -> float:
        """When models and contributions may move again, Unix time; 0 if they may now."""
        changes = self.allowance.changes
        return 0.0 if self.is_open or changes is None else changes.astimezone().timestamp()

    def facts(self) -> dict[str, Any]:
        """The same for the log and the command line; times are RFC 3339."""
        return facts_of(self.allowance)


def facts_of(allowance: Allowance) -> dict[str, Any]:
    """An allowance as data."""
    changes = allowance.changes
    return {
        "up_mbit_per_s": allowance.up_mbit_per_s,
        "down_mbit_per_s": allowance.down_mbit_per_s,
        "open": allowance.is_open,
        "changes": changes.astimezone().isoformat(timespec="minutes") if changes else None,
    }


def in_words(facts: dict[str, Any]) -> str:
    """Caps and window for people."""
    caps = [
        f"{way} {facts[key]:g} Mbit/s" if facts[key] else f"{way} without a cap"
        for way, key in (("up", "up_mbit_per_s"), ("down", "down_mbit_per_s"))
    ]
    words = ", ".join(caps)
    if facts["changes"] is None:
        return words
    when = datetime.fromisoformat(facts["changes"]).strftime("%a %H:%M")
    if facts["open"]:
        return f"{words}; the window is open, its caps or itself end {when}"
    return f"{words}; no window is open, models and contributions wait until {when}"
