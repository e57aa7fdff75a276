"""A whole federation on this machine: a daemon and site agents as real processes, over real mTLS.

The demo, the benchmarks and the tests run on it, so that what they show is what is installed in a
data center, and nothing that they start outlives them::

    with Federation(Path("somewhere"), sites={"north": {"tasks": {...}}, "south": {...}}) as f:
        run = f.launch({"name": "first", "rounds": 3, "task": {"name": "digits"}})
        print(f.wait(run).scores)
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from orchestrator import views
from orchestrator.child import Child, end_at_once, marked, program, undisturbed, wait_gone
from orchestrator.client import EventStream, OperatorClient
from orchestrator.home import Home
from orchestrator.port import free_port
from orchestrator.toml_text import document
from protos.errors import ComputeFailed, DeadlineExceeded, NotFound
from strategies.row import merged

MARK = "FARFLUNG_FEDERATION"
"""Every process of a federation carries this variable, so that none is overlooked at the end."""

DAEMON = "daemon"
READY_S = 60.0
READY_PER_SITE_S = 3.0  # they are started at once, and each takes a second of a core
STOP_S = 15.0
ENDED = frozenset({"finished", "stopped", "paused", "failed"})

Tables = Mapping[str, Any]
"""What a TOML document holds."""


class Federation:
    """A federation with its own home, ports and processes.

    Use it from one thread that lives as long as the federation does: its processes end with
    that thread.

    Args:
        root: Folder for everything: ``orchestrator`` (the home), ``sites/NAME``, ``log``. A folder
            that holds a federation already is taken up again.
        sites: For each site its ``site.toml``, as tables.
        orchestrator_tasks: ``[tasks]`` of the daemon's configuration.
        daemon: Further sections of ``farflung.toml``, laid over the defaults.
        environment: Variables for all processes, on top of this process's own.
        dashboard: Whether to serve the page.

    Attributes:
        root: As given.
        home: The daemon's home.
        client: The operator's client; there once the federation has started.
    """

    def __init__(
        self,
        root: Path,
        sites: Mapping[str, Tables],
        orchestrator_tasks: Tables | None = None,
        daemon: Tables | None = None,
        environment: Mapping[str, str] | None = None,
        dashboard: bool = True,
    ) -> None:
        self.root = root.absolute()
        self.home = Home(self.root / "orchestrator")
        self.sites = {name: dict(tables) for name, tables in sites.items()}
        self._settings = merged(
            {
                "tasks": dict(orchestrator_tasks or {}),
                "dashboard": {"port": 0 if dashboard else -1},
            },
            daemon or {},
        )
        self._mark = secrets.token_hex(8)
        self._environment = {**os.environ, **(environment or {}), MARK: self._mark}
        self._children: dict[str, Child] = {}
        self._family: dict[int, psutil.Process] = {}  # whom our children started, by id
        self._client: OperatorClient | None = None
        self._seen = 0  # number of the newest event that was waited for
        self._streams: dict[EventStream, Callable[[Child], bool]] = {}

    # -- beginning and end ------------------------------------------------------------------------

    def __enter__(self) -> Federation:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Make what is missing, start daemon and sites, and wait until all sites are attached."""
        self.configure()
        self.start_daemon()
        self.enroll(self.sites)
        for site in self.sites:
            self.start_site(site, wait=False)
        self.await_sites(self.sites)

    def configure(self) -> None:
        """Make the home if there is none, and write its configuration."""
        if not self.home.config_file.exists():
            Home.create(self.home.path, bind=f"127.0.0.1:{free_port()}")
        present = tomllib.loads(self.home.config_file.read_text())
        self.home.config_file.write_text(document(merged(present, self._settings)))

    def close(self) -> None:
        """End every process that this federation started, gently and then not."""
        with undisturbed():
            self._close()

    def _close(self) -> None:
        self._remember()
        for child in self._children.values():
            child.terminate()
        deadline = time.monotonic() + STOP_S
        for child in self._children.values():
            try:
                child.join(max(0.0, deadline - time.monotonic()))
            except ComputeFailed:
                child.kill()
        if self._client is not None:
            self._client.close()
            self._client = None
        left = wait_gone(self._family.values(), 1.0)
        end_at_once(
            {process.pid: process for process in [*left, *marked(MARK, self._mark)]}.values()
        )
        self._children.clear()
        self._family.clear()

    def processes(self) -> list[psutil.Process]:
        """Every process of the federation that runs now."""
        self._remember()
        return [process for process in self._family.values() if process.is_running()]

    def _remember(self) -> None:
        # Who is orphaned later can't be found by descent any more.
        for child in self._children.values():
            self._family.update({process.pid: process for process in child.tree()})

    # -- the daemon ------------------------------------------------------------------------------

    @property
    def client(self) -> OperatorClient:
        """The operator's client."""
        if self._client is None:
            raise NotFound("federation: it has not been started")
        return self._client

    @property
    def daemon(self) -> Child:
        """The daemon's process."""
        return self._children[DAEMON]

    def agents(self) -> dict[str, Child]:
        """The process of each site's agent."""
        return {name: self._children[name] for name in self.sites if name in self._children}

    def start_daemon(self) -> dict[str, Any]:
        """Start the daemon and wait until it is ready.

        Returns:
            What it says: its addresses and process id.
        """
        command = [*program("farflung", "orchestrator.cli"), "serve", "--json"]
        child = self._start(DAEMON, [*command, "--home", str(self.home.path)])
        ready: dict[str, Any] = json.loads(child.first_line(READY_S))
        if self._client is None:
            self._client = OperatorClient(self.home.path)
        return ready

    def stop_daemon(self) -> None:
        """End the daemon as an operator would."""
        self._remember()
        self.daemon.terminate()
        self.daemon.join(STOP_S)

    def kill_daemon(self) -> None:
        """``kill -9`` the daemon, and wait until what it had started is gone too."""
        self._remember()
        family = self.daemon.tree()
        end_at_once(family[:1])
        self.daemon.join(STOP_S)
        end_at_once(wait_gone(family, 10.0))

    # -- sites -----------------------------------------------------------------------------------

    def folder(self, site: str) -> Path:
        """A site's own folder."""
        return self.root / "sites" / site

    def add_site(self, site: str, tables: Tables) -> None:
        """Enroll one more site and start it."""
        self.sites[site] = dict(tables)
        self.enroll([site])
        self.start_site(site)

    def enroll(self, sites: Sequence[str] | Mapping[str, Any]) -> None:
        """Write the sites' configurations, and join those that have not joined yet."""
        joining = []
        for site in sites:
            folder = self.folder(site)
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            (folder / "site.toml").write_text(document(self.sites[site]))
            if (folder / "keys" / "identity.json").exists():
                continue
            token = folder / "token"
            token.touch(mode=0o600)
            token.write_text(self.client.invite(site).token)
            joining.append((token, self._site_command(site, "join", f"@{token}")))
        for token, child in joining:
            if child.join(READY_S + READY_PER_SITE_S * len(joining)) != 0:
                raise ComputeFailed(f"{child.described()}\n{child.tail()}", process=child.name)
            token.unlink()

    def start_site(self, site: str, wait: bool = True) -> None:
        """Start a site's agent, and wait until it is attached unless told not to."""
        self._site_command(site, "run")
        if wait:
            self.await_sites([site])

    def _site_command(self, site: str, *words: str) -> Child:
        command = program("farflung-site", "site_agent.cli")
        home = ["--home", str(self.folder(site))]
        return self._start(site, [*command, words[0], *home, *words[1:]])

    def stop_site(self, site: str) -> None:
        """End a site's agent as its owner would."""
        self._remember()
        self._children[site].terminate()
        self._children[site].join(STOP_S)

    def kill(self, site: str) -> None:
        """``kill -9`` a site's agent with its trainer."""
        self._remember()
        self._children[site].kill()

    def await_sites(self, sites: Sequence[str] | Mapping[str, Any], timeout_s: float = 0.0) -> None:
        """Wait until sites are attached; 0 seconds for as long as so many may take.

        Raises:
            ComputeFailed: One of them ended instead, or is not attached in time.
        """

        def attached() -> bool:
            states = {site.name: site.state for site in self.client.sites()}
            return all(states.get(site) in ("attached", "paused") for site in sites)

        watched = {site: self._children[site] for site in sites if site in self._children}
        limit_s = timeout_s or READY_S + READY_PER_SITE_S * len(sites)
        self._until(attached, f"sites {', '.join(sites)} attached", limit_s, watched)

    # -- runs ------------------------------------------------------------------------------------

    def launch(self, config: Tables | str, start_from: str = "", start_file: bytes = b"") -> str:
        """Submit a run, as tables or TOML text; gives its id."""
        text = config if isinstance(config, str) else document(config)
        return self.client.launch(text, start_from, start_file).id

    def wait(self, run: str, timeout_s: float = 600.0) -> views.Run:
        """Wait until a run ended, well or not.

        Raises:
            DeadlineExceeded: It did not in time.
            ComputeFailed: The daemon ended instead.
        """

        def ended() -> bool:
            return self.client.run(run).state in ENDED

        self._until(ended, f"run {run} ended", timeout_s, {DAEMON: self.daemon}, run)
        return self.client.run(run)

    def run(self, config: Tables | str, timeout_s: float = 600.0) -> views.Run:
        """Launch a run and wait for its end."""
        return self.wait(self.launch(config), timeout_s)

    def rounds(self, run: str) -> list[views.Round]:
        """The rounds of a run."""
        return self.client.rounds(run)

    def until(
        self,
        happened: Callable[[views.Event], bool],
        run: str = "",
        after: int = 0,
        timeout_s: float = 60.0,
    ) -> views.Event:
        """Wait for an event, from the one after number ``after`` on.

        Raises:
            DeadlineExceeded: It did not come in time.
            ComputeFailed: The daemon ended instead.
        """
        found: list[views.Event] = []

        def look(event: views.Event) -> bool:
            if happened(event):
                found.append(event)
            return bool(found)

        self._follow(look, "the event", timeout_s, {DAEMON: self.daemon}, run, after)
        return found[0]

    def _until(
        self,
        done: Callable[[], bool],
        what: str,
        timeout_s: float,
        watched: Mapping[str, Child],
        run: str = "",
    ) -> None:
        """Wait until something is so, which is looked at again after every event."""
        if done():
            return

        def look(event: views.Event) -> bool:
            self._seen = max(self._seen, event.number)
            return event.kind in ("run", "site", "daemon") and done()

        self._follow(look, what, timeout_s, watched, run, self._seen, done)

    def _follow(
        self,
        look: Callable[[views.Event], bool],
        what: str,
        timeout_s: float,
        watched: Mapping[str, Child],
        run: str,
        after: int,
        done: Callable[[], bool] = lambda: False,
    ) -> None:
        stream = self.client.watch(run, after)
        self._streams[stream] = lambda child: child in watched.values()
        timer = threading.Timer(timeout_s, stream.close)
        timer.daemon = True
        timer.start()
        try:
            # What happened before the stream was open is in no event of it.
            if done() or any(look(event) for event in stream):
                return
            for child in watched.values():
                if not child.alive:
                    raise ComputeFailed(f"{child.described()}\n{child.tail()}", process=child.name)
            raise DeadlineExceeded(f"federation: not {what} within {timeout_s:g} s\n{self.told()}")
        finally:
            timer.cancel()
            del self._streams[stream]
            stream.close()

    # -- what it says ----------------------------------------------------------------------------

    def logs(self) -> dict[str, Path]:
        """The log of each process, by its name."""
        return {name: child.log for name, child in self._children.items()}

    def told(self) -> str:
        """The last lines of every log, for messages."""
        return "\n".join(f"-- {c.described()}\n{c.tail()}" for c in self._children.values())

    # -- processes -------------------------------------------------------------------------------

    def _start(self, name: str, command: Sequence[str]) -> Child:
        log, variables = self.root / "log" / f"{name}.log", self._variables(name)
        self._children[name] = child = Child(name, command, log, variables, self._ended)
        return child

    def _variables(self, name: str) -> dict[str, str]:
        """The environment of a process: daemon, or a site's agent."""
        return self._environment

    def _ended(self, child: Child) -> None:
        """Wake whoever waits for something that this process won't do any more."""
        for stream, concerns in list(self._streams.items()):
            if concerns(child):
                stream.close()
