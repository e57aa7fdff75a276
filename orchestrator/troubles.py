"""What keeps a site from taking part, as the orchestrator's end sees it: told once, shown while it lasts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.ledger import Ledger
from protos.errors import NotFound

LASTS_S = 60.0
"""A trouble of which nothing more is heard is over after this; who is turned away comes every 15 s."""


@dataclass
class _Trouble:
    text: str
    heard: float


class Troubles:
    """The troubles of all sites.

    Args:
        ledger: Knows until when their certificates are valid.
        note: Called with (level, site, text) for what an operator should read.
    """

    def __init__(self, ledger: Ledger, note: Callable[[str, str, str], None]) -> None:
        self._ledger, self._note = ledger, note
        self._lock = threading.Lock()
        self._sites: dict[str, _Trouble] = {}

    def tell(self, site: str, text: str) -> None:
        """A site was turned away, or what it sends can't be taken in just now."""
        with self._lock:
            known = self._current(site)
            self._sites[site] = _Trouble(text, time.monotonic())
        if known != text:
            self._note("error", site, text)

    def over(self, site: str) -> None:
        """It is well again."""
        with self._lock:
            self._sites.pop(site, None)

    def of(self, site: str, attached: bool) -> str:
        """What keeps a site from taking part; empty if nothing is known to.

        Args:
            site: Its name.
            attached: Whether it is here. Of one that is not, an expired certificate is a reason:
                it ends the handshake, so that nobody hears who called.
        """
        with self._lock:
            known = self._current(site)
        if known or attached:
            return known
        try:
            row = self._ledger.site(site)
        except NotFound:
            return ""
        ends = row.certificate_expires
        if row.state == "revoked":
            return f"site {site}: it was revoked"
        if ends is None or ends > time.time():
            return ""
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ends))
        return (
            f"site {site}: its certificate expired at {when}; `farflung invite {site}` makes a new "
            "join token"
        )

    def _current(self, site: str) -> str:
        trouble = self._sites.get(site)
        fresh = trouble is not None and time.monotonic() - trouble.heard < LASTS_S
        return trouble.text if trouble is not None and fresh else ""
