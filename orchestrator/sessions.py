"""The sites' long-lived control streams: who is here, what is pushed to whom."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from protos.errors import Conflict
from protos.faults import reach
from protos.v1 import site_pb2

log = logging.getLogger(__name__)

END = None

REPLACED = 8
"""So many agents of a site are remembered that another one has taken the place of."""


@dataclass
class Session:
    """One attached site.

    Attributes:
        site: Its name.
        fingerprint: Of the certificate of its connection.
        hello: What it said of itself.
        since: When it attached.
        last_seen: When it last said something.
        paused: It takes no new plans.
        given: Index of the small model that it was given last; whoever asks for the same model
            again need not give it again.
    """

    site: str
    fingerprint: str
    hello: site_pb2.Hello
    since: float = field(default_factory=time.time)
    last_seen: float = field(default_factory=time.monotonic)
    paused: bool = False
    given: bytes | None = None
    _outgoing: queue.SimpleQueue[site_pb2.ToSite | None] = field(default_factory=queue.SimpleQueue)

    def send(self, message: site_pb2.ToSite) -> None:
        """Push a message; returns at once."""
        self._outgoing.put(message)

    def end(self) -> None:
        """End the stream after what was pushed."""
        self._outgoing.put(END)

    def outgoing(self) -> Iterator[site_pb2.ToSite]:
        """What is to be sent, until `end`."""
        while (message := self._outgoing.get()) is not END:
            reach("session.saying")
            yield message


class Sessions:
    """All attached sites.

    Args:
        gone_s: Silence after which a site counts as gone.
        on_attached: Called with the site's name, from the stream's thread.
        on_gone: Called with the site's name, from the stream's or the watch's thread.
    """

    def __init__(
        self,
        gone_s: float,
        on_attached: Callable[[str], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._gone_s = gone_s
        self._on_attached, self._on_gone = on_attached, on_gone
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self.last_seen: dict[str, float] = {}
        self._replaced: defaultdict[str, deque[str]] = defaultdict(lambda: deque(maxlen=REPLACED))
        self._stop = threading.Event()
        self._watch = threading.Thread(target=self._watch_silence, name="sessions", daemon=True)
        self._watch.start()

    def attach(self, session: Session) -> None:
        """A site said hello. An older stream of the same site is ended: the newest is the true one.

        Raises:
            Conflict: It is the stream of an agent whose place another one has taken, which is here:
                two agents run with the same keys.
        """
        with self._lock:
            old = self._sessions.get(session.site)
            self._tell_apart(session, old)
            self._sessions[session.site] = session
            reach("session.attached")
        if old is not None:
            log.warning("site %s attached again; its older stream is ended", session.site)
            old.end()
        self._on_attached(session.site)

    def _tell_apart(self, session: Session, old: Session | None) -> None:
        """An agent that was started anew takes the place of its predecessor, which is seen no more."""
        mine = session.hello.instance[:64]
        other = old.hello.instance[:64] if old is not None else ""
        if not mine or not other or mine == other or old is None:
            return
        if mine in self._replaced[session.site]:
            since = time.strftime("%H:%M:%S", time.localtime(old.since))
            raise Conflict(
                f"site {session.site}: two agents use its certificate; the one that came later is "
                f"attached since {since}, this one is turned away. Stop one of them; if its folder "
                "was copied, have the copy join with a token and a name of its own",
                site=session.site,
            )
        self._replaced[session.site].append(other)

    def detach(self, session: Session) -> None:
        """A stream ended."""
        with self._lock:
            current = self._sessions.get(session.site) is session
            if current:
                del self._sessions[session.site]
                reach("session.detached")
                self.last_seen[session.site] = time.time()
        if current:
            self._on_gone(session.site)

    def send(self, site: str, message: site_pb2.ToSite) -> bool:
        """Push a message to a site; whether it is attached."""
        session = self.get(site)
        if session is not None:
            session.send(message)
        return session is not None

    def get(self, site: str) -> Session | None:
        """The session of a site; None if it is not attached."""
        with self._lock:
            return self._sessions.get(site)

    def all(self) -> list[Session]:
        """The sessions, by site name."""
        with self._lock:
            return [self._sessions[s] for s in sorted(self._sessions)]

    def end(self, site: str) -> None:
        """End a site's stream (revoked)."""
        session = self.get(site)
        if session is not None:
            session.end()
            self.detach(session)

    def drain(self, reason: str) -> None:
        """Tell every site that this daemon is about to end, and end the streams."""
        self._stop.set()
        for session in self.all():
            session.send(site_pb2.ToSite(drain=site_pb2.Drain(reason=reason)))
            session.end()

    def _watch_silence(self) -> None:
        while not self._stop.wait(self._gone_s / 6):
            limit = time.monotonic() - self._gone_s
            for session in self.all():
                if session.last_seen < limit:
                    log.warning("site %s has been silent for %.1f s", session.site, self._gone_s)
                    session.end()
                    self.detach(session)
