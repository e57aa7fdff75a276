"""Keeps [network] in force while the agent runs: watches site.toml and the clock, moves the valve."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from site_agent.config import SiteConfig
from site_agent.home import Home
from site_agent.link.journal import Journal
from site_agent.link.live_config import LiveConfig
from site_agent.link.network import Network
from site_agent.link.valve import Valve

LOOK_S = 1.0
"""How often it is looked at site.toml and at the clock of the windows."""


class Mover(Protocol):
    """What moves models or contributions."""

    def allowed(self, allowed: bool) -> None:
        """Whether they may move now."""

    def reconnect(self) -> None:
        """Use a new connection from now on."""


class Line:
    """The site's line to the orchestrator, as far as models and contributions go.

    Args:
        home: The site's folder.
        config: ``site.toml`` as it was read at the start.
        address: host:port of the orchestrator.
        journal: Log.
    """

    def __init__(
        self, home: Home, config: SiteConfig, address: Callable[[], str], journal: Journal
    ) -> None:
        self._journal, self._stop = journal, threading.Event()
        self._live = LiveConfig(home.config, config, journal)
        self.network = Network(config.network)
        up, down = self.network.up, self.network.down
        self._valve = Valve(home.root / "bulk.sock", address, up, down, journal)

    def target(self) -> str:
        """What a bulk connection dials instead of the orchestrator; empty for nothing."""
        return self._valve.target if self.network.is_capped else ""

    def reread(self) -> None:
        """Read site.toml again; may be called from a signal handler."""
        self._live.ask()

    def stop(self) -> None:
        """End the threads."""
        self._stop.set()
        self._valve.close()

    def run(
        self,
        movers: tuple[Mover, ...],
        configured: Callable[[SiteConfig], None],
        changed: Callable[[], None],
    ) -> None:
        """Watch until stopped.

        Args:
            movers: Who is told when something else is allowed.
            configured: Called with another configuration, of which only what may change is.
            changed: Called when other caps are in force, or a window began or ended.
        """
        threading.Thread(target=self._valve.run, name="valve", daemon=True).start()
        while not self._stop.wait(LOOK_S):
            if self._live.look():
                self.network.apply(self._live.config.network)
                configured(self._live.config)
            if self._follow(movers):
                changed()

    def _follow(self, movers: tuple[Mover, ...]) -> bool:
        """Do what the network's rules say now; whether they are others than before."""
        before, now = self.network.look()
        if before.rules == now.rules:
            return False
        self._journal.info("caps or windows are others now", **self.network.facts())
        for mover in movers:
            if before.is_open != now.is_open:
                mover.allowed(now.is_open)
            elif now.is_capped:
                mover.reconnect()  # a connection through the valve, made for this pace
        return True
