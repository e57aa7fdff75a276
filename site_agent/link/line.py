"""Keeps [network] in force while the agent runs: watches site.toml and the clock, moves the valve."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any, Protocol

from site_agent.config import MBIT_BYTES, SiteConfig
from site_agent.home import Home
from site_agent.link.courtesy import Courtesy
from site_agent.link.journal import Journal
from site_agent.link.live_config import LiveConfig
from site_agent.link.network import Network
from site_agent.link.throttle import Throttle
from site_agent.link.valve import Valve

LOOK_S = 1.0
"""How often it is looked at site.toml and at the clock of the windows."""


class Mover(Protocol):
    """What moves models or contributions.

    Attributes:
        busy: Whether a transfer is under way.
    """

    busy: bool

    def allowed(self, allowed: bool) -> None:
        """Whether they may move now."""

    def reconnect(self) -> None:
        """Use a new connection from now on."""


class Down(Mover, Protocol):
    """What moves models; ``received_bytes`` so far, by whole chunks."""

    received_bytes: int


class Up(Mover, Protocol):
    """What moves contributions; ``sent_bytes`` so far, by whole chunks."""

    sent_bytes: int


class Control(Protocol):
    """The control stream.

    Attributes:
        hurried: Whether heartbeats are wanted more often, to see how long they take.
    """

    hurried: bool

    @property
    def round_trip_s(self) -> float | None:
        """How long a heartbeat takes there and back; None if unknown."""


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
        self._courtesies = {"down": Courtesy(), "up": Courtesy()}
        up, down = self.network.up, self.network.down
        self._valve = Valve(home.root / "bulk.sock", address, up, down, journal)

    def target(self) -> str:
        """What a bulk connection dials instead of the orchestrator; empty for nothing."""
        return self._valve.target if self.network.is_paced else ""

    def facts(self) -> dict[str, Any]:
        """What is in force, as data."""
        paces = {way: c.bytes_per_s / MBIT_BYTES for way, c in self._courtesies.items()}
        return {**self.network.facts(), "narrow_mbit_per_s": {w: p for w, p in paces.items() if p}}

    def reread(self) -> None:
        """Read site.toml again; may be called from a signal handler."""
        self._live.ask()

    def stop(self) -> None:
        """End the threads."""
        self._stop.set()
        self._valve.close()

    def run(
        self,
        fetcher: Down,
        sender: Up,
        control: Control,
        configured: Callable[[SiteConfig], None],
        changed: Callable[[], None],
    ) -> None:
        """Watch until stopped.

        Args:
            fetcher: Moves models down.
            sender: Moves contributions up.
            control: Whose delay shows that the line is full.
            configured: Called with another configuration, of which only what may change is.
            changed: Called when other caps are in force, or a window began or ended.
        """
        threading.Thread(target=self._valve.run, name="valve", daemon=True).start()
        while not self._stop.wait(LOOK_S):
            if self._live.look():
                self.network.apply(self._live.config.network)
                configured(self._live.config)
            if self._follow((fetcher, sender)):
                changed()
            self._leave_room(fetcher, sender, control)

    def _follow(self, movers: tuple[Mover, ...]) -> bool:
        """Do what the network's rules say now; whether they are others than before."""
        before, now = self.network.look()
        if before.rules == now.rules:
            return False
        self._journal.info("caps or windows are others now", **self.network.facts())
        for mover in movers:
            if before.is_open != now.is_open:
                mover.allowed(now.is_open)
            else:
                mover.reconnect()  # through the valve and made for this pace, or not through it
        return True

    def _leave_room(self, fetcher: Down, sender: Up, control: Control) -> None:
        """Slow down what keeps control waiting."""
        ways: tuple[tuple[str, Throttle, Mover, int], ...] = (
            ("down", self.network.down, fetcher, fetcher.received_bytes),
            ("up", self.network.up, sender, sender.sent_bytes),
        )
        for way, throttle, mover, moved in ways:
            courtesy = self._courtesies[way]
            if throttle.bytes_per_s:
                moved = throttle.passed_bytes
            pace = courtesy.look(monotonic(), control.round_trip_s, moved, mover.busy)
            before, throttle.courteous = throttle.courteous, pace
            if bool(before) != bool(pace):
                event = "bulk leaves room on a narrow line" if pace else "the line is wide again"
                facts = {"round_trip_s": control.round_trip_s, "mbit_per_s": pace / MBIT_BYTES}
                self._journal.info(event, way=way, **facts)
                mover.reconnect()  # through the valve, or not any more
        control.hurried = any(c.bytes_per_s for c in self._courtesies.values())
