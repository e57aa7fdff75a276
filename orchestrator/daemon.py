"""``farflung serve``: puts the parts together, keeps them alive, takes them apart."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from protos.faults import reach

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

import grpc

from orchestrator.blocks import Blocks
from orchestrator.board import Board
from orchestrator.client import OperatorClient
from orchestrator.compute.client import ComputeClient
from orchestrator.compute_settings import compute_config, described
from orchestrator.doorkeeper import Doorkeeper
from orchestrator.exchange import Exchange
from orchestrator.gateway.gateway_service import GatewayService
from orchestrator.gateway.supervisor import Gateways, reserve
from orchestrator.home import Home, split_address
from orchestrator.intake import Intake
from orchestrator.ledger import EventLog, Ledger, Signer
from orchestrator.operator_service import OperatorService
from orchestrator.operator_socket import GATEWAY, SOCKET_NAME, OperatorSocket
from orchestrator.publisher import Publisher
from orchestrator.reception import Reception
from orchestrator.recorder import LedgerRecorder
from orchestrator.restart import take_up_rounds
from orchestrator.rounds.engine import Engine
from orchestrator.runs import Runner
from orchestrator.sessions import Sessions
from orchestrator.site_server import ServerKeys, add_port, site_server
from orchestrator.site_service import BulkService, ControlService
from orchestrator.store import open_store
from orchestrator.viewing import Viewing
from orchestrator.views import Daemon as DaemonView
from orchestrator.views import Event
from protos import __version__
from protos.bulk import add_bulk
from protos.v1 import gateway_pb2_grpc, operator_pb2_grpc, site_pb2_grpc

log = logging.getLogger(__name__)


class Daemon:
    """All parts of a running orchestrator.

    Args:
        path: Its home folder.
    """

    def __init__(self, path: Path) -> None:
        self.home = Home(path)
        self.home.require()
        self._closing = ExitStack()
        self._started = time.time()
        self._compute_state: tuple[str, str] = ("starting", "")
        self._ended = threading.Event()
        self._stale: dict[str, None] = {}  # runs whose view changed since it was published
        self._committed: deque[tuple[str, int, int]] = deque()  # attempts, not yet published so
        self._shown: dict[str, str] = {}  # the state of each run as it was published
        self.address = ""
        self.dashboard = ""

    def start(self) -> None:
        """Start everything; Ray comes up once sites can connect."""
        home = self.home
        self._closing.callback(home.lock().close)
        home.make_folders()
        config = self.config = home.config
        self.ledger = Ledger.open(config.ledger.url or home.ledger)
        self._closing.callback(self.ledger.close)
        reach("daemon.ledger.opened")
        self.ledger.sign_with(Signer(home.authority(), home.federation))
        self.events = EventLog(home.progress)
        self._closing.callback(self.events.close)
        take_up_rounds(self.ledger, self.events.last_heartbeat(), config.sites.grace_s)
        reach("daemon.deadlines.moved")
        self.store = open_store(config, home.store, home.federation)
        self.store.clean()
        reach("daemon.store.cleaned")
        settings = compute_config(home, config.ray)
        self.compute = ComputeClient(
            settings,
            log=home.log / "compute.log",
            on_event=self._on_compute,
        )
        self._round_news = Publisher(self._publish_round)
        self._closing.callback(self._round_news.close)
        self._run_news = Publisher(self._publish_runs)
        self._closing.callback(self._run_news.close)
        self.board = Board(self._round_news.soon)
        self.exchange = Exchange(
            self.ledger, self.board, config.sites.grace_s, self._note_about_site
        )
        self.sessions = Sessions(config.sites.gone_s, self._attached, self._gone)
        self.exchange.sessions = self.sessions
        self.viewing = Viewing(self.ledger, self.board, self.sessions, self.exchange.troubles)
        self.engine = Engine(
            home=home,
            config=config,
            ledger=self.ledger,
            store=self.store,
            compute=self.compute,
            board=self.board,
            exchange=self.exchange,
            note=self.note,
            publish=self._round_news.soon,
            workers=settings.num_cpus,
        )
        self.runner = Runner(self.engine, self.changed)
        self._closing.callback(self.compute.stop)
        self._serve_sites()
        reach("daemon.sites.served")
        self.compute.start()
        reach("daemon.compute.started")
        self._serve_operators()
        self._serve_page()
        self._closing.callback(lambda: self.sessions.drain("the orchestrator is stopping"))
        self.runner.start()
        self._closing.callback(self.runner.end)
        reach("daemon.runner.started")
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        carried = f", {n} gateways carry bulk" if (n := config.gateways.processes) else ""
        self.note("info", "", None, "", f"the daemon started, sites dial {self.address}{carried}")

    def stop(self) -> None:
        """Stop everything that was started; what is open goes on with the next start."""
        self._ended.set()
        self._closing.close()

    # -- servers ----------------------------------------------------------------------------------

    def _serve_sites(self) -> None:
        home, config = self.home, self.config
        keys = ServerKeys.of(home, config)
        doorkeeper = Doorkeeper(self.ledger, home.federation)
        recorder, blocks = LedgerRecorder(self.ledger, self.exchange), Blocks(self.engine)
        intake = Intake(self.ledger, self.store, home.spool, recorder, blocks)
        reception = Reception(self.ledger, intake, recorder)
        bulk_address = ""
        if config.gateways.processes:
            bulk_address = self._start_gateways(keys, recorder, blocks, intake)
        else:
            intake.sweep()
        control = ControlService(
            home, self.ledger, doorkeeper, self.sessions, self.exchange,
            config.sites.heartbeat_s, bulk_address, None if bulk_address else reception,
        )  # fmt: skip
        server = site_server()
        site_pb2_grpc.add_ControlServicer_to_server(control, server)
        # With gateways too: sites of an earlier version know no other address.
        bulk = BulkService(self.ledger, self.store, doorkeeper, reception, recorder)
        add_bulk(bulk, server)
        port = add_port(server, config.listen.bind, keys, "listen.bind")
        server.start()
        self._closing.callback(lambda: server.stop(grace=1.0).wait())
        host, _ = split_address(config.listen.bind)
        self.address = config.listen.address or f"{_dialled(host)}:{port}"

    def _start_gateways(
        self, keys: ServerKeys, recorder: LedgerRecorder, blocks: Blocks, intake: Intake
    ) -> str:
        """What sites are told of where the gateways are."""
        config = self.config
        held = reserve(config.gateways_bind)
        self._closing.callback(held.close)
        intake.sweep()  # now, when the gateways of an earlier daemon are gone
        host, _ = split_address(config.gateways_bind)
        port = held.getsockname()[1]
        bind = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        service = GatewayService(
            config, self.home.federation, bind, keys, self.ledger, recorder, blocks
        )
        self._serve_locally(
            GATEWAY, lambda server: gateway_pb2_grpc.add_GatewayServicer_to_server(service, server)
        )
        gateways = Gateways(
            self.home, config.gateways.processes, lambda level, t: self.note(level, "", None, "", t)
        )
        self._closing.callback(gateways.stop)
        gateways.start()
        return config.gateways.address or f":{port}"

    def _serve_operators(self) -> None:
        service = OperatorService(
            self.engine,
            self.runner,
            self.sessions,
            self.viewing,
            self.events,
            self.status,
            self.changed,
            lambda: self.address,
        )
        self._serve_locally(
            SOCKET_NAME,
            lambda server: operator_pb2_grpc.add_OperatorServicer_to_server(service, server),
        )

    def _serve_locally(self, name: str, add: Callable[[grpc.Server], None]) -> None:
        """Serve on a Unix socket of the home, for this user alone."""
        where = OperatorSocket(self.home.path, name)
        self._closing.callback(where.close)
        server = where.serve(add)
        self._closing.callback(lambda: server.stop(grace=0.5).wait())

    def _serve_page(self) -> None:
        if self.config.dashboard.port < 0:
            return
        from orchestrator.dashboard.app import serve as serve_page

        operator = OperatorClient(self.home.path)
        self._closing.callback(operator.close)
        page = serve_page(operator, self.config.dashboard.host, self.config.dashboard.port)
        self._closing.callback(page.stop)
        self.dashboard = page.url

    # -- what the parts tell one another ------------------------------------------------------------

    def note(self, level: str, run: str, round: int | None, site: str, text: str) -> None:
        """Something that an operator should read: into the log and the event stream."""
        log.log(
            {"error": logging.ERROR, "warning": logging.WARNING}.get(level, logging.INFO),
            text,
            extra={"run": run, "round": round, "site": site},
        )
        self._append(
            Event(
                number=0,
                time=time.time(),
                kind="log",
                run=run,
                round=round,
                site=site,
                level=level if level in ("warning", "error") else "info",
                text=text,
            )
        )

    def _note_about_site(self, level: str, site: str, text: str) -> None:
        run, number, _ = self.board.key
        self.note(level, run, number if run else None, site, text)

    def changed(self, run: str, committed: bool = False) -> None:
        """A run's view changed: only because a round of it is committed, or for another reason."""
        key = self.board.key
        self._stale[run] = None
        steady = committed and self._shown.get(run) == "running"
        if key[0] == run and steady:
            self._committed.append(key)  # its view does not need the board any more
            self._round_news.soon()
        elif key[0] == run:
            self._round_news.now()
        if steady:
            self._run_news.soon()
        else:
            self._run_news.now()

    def _publish_runs(self) -> None:
        while self._stale:
            run, _ = self._stale.popitem()
            view = self.viewing.run(run)
            self._shown[run] = view.state
            self._append(
                Event(
                    number=0,
                    time=time.time(),
                    kind="run",
                    run=run,
                    text=view.headline,
                    data=view.model_dump(mode="json"),
                )
            )

    def _publish_round(self) -> None:
        if self._ended.is_set() or not hasattr(self, "engine"):
            return
        committed = [self._committed.popleft() for _ in range(len(self._committed))]
        for key in dict.fromkeys([*committed, self.board.key]):
            view = self.viewing.attempt(*key)
            if view is not None:
                self._append(
                    Event(
                        number=0,
                        time=time.time(),
                        kind="round",
                        run=view.run,
                        round=view.round,
                        data=view.model_dump(mode="json"),
                    )
                )

    def _publish_site(self, site: str, text: str) -> None:
        if self._ended.is_set():
            return
        view = self.viewing.site(site)
        self._append(
            Event(
                number=0,
                time=time.time(),
                kind="site",
                site=site,
                text=text,
                data=view.model_dump(mode="json"),
            )
        )

    def _append(self, event: Event) -> None:
        self.events.append(event)

    def _attached(self, site: str) -> None:
        self.exchange.attached(site)
        self._publish_site(site, f"site {site} is attached")

    def _gone(self, site: str) -> None:
        self.exchange.gone(site)
        self._publish_site(site, f"site {site} is gone")

    def _on_compute(self, kind: str, facts: dict[str, Any]) -> None:
        if kind == "ready":
            self.engine.workers = facts["num_cpus"]  # a cluster knows how many it has
        detail = str(facts.get("message") or facts.get("reason") or described(facts))
        state = {"ready": "ready", "failed": "failed"}.get(kind, "starting")
        self._compute_state = (state, detail)
        urgency = "info" if kind == "ready" else "error" if kind == "failed" else "warning"
        self.note(urgency, "", None, "", f"compute: {kind}{': ' + detail if detail else ''}")

    # -- life -----------------------------------------------------------------------------------------

    def status(self) -> DaemonView:
        """The daemon as a view."""
        runs = self.ledger.runs()
        state, detail = self._compute_state
        return DaemonView(
            federation=self.home.federation,
            version=__version__,
            address=self.address,
            dashboard=self.dashboard,
            home=str(self.home.path),
            compute=state,
            compute_detail=detail,
            started=self._started,
            sites=sum(1 for s in self.ledger.sites() if s.state == "enrolled"),
            attached=len(self.sessions.all()),
            queued=sum(1 for r in runs if r.state == "queued"),
            running=next((r.name for r in runs if r.state == "running"), None),
        )

    def _beat(self) -> None:
        while not self._ended.wait(1.0):
            self.events.heartbeat(time.time())


def _dialled(host: str) -> str:
    """What a site may dial for an address that was bound."""
    return socket.gethostname() if host in ("0.0.0.0", "::") else host  # noqa: S104


def serve(path: Path, ready: Callable[[DaemonView], None] | None = None) -> None:
    """Run a daemon until SIGTERM or SIGINT.

    Args:
        path: The home folder.
        ready: Called once sites, operators and browsers can reach it.
    """
    from orchestrator.logs import log_to

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    daemon = Daemon(path)
    log_to(daemon.home.log)
    try:
        daemon.start()
        if ready is not None:
            ready(daemon.status())
        ended.wait()
    finally:
        daemon.stop()
