"""``python -m orchestrator.gateway HOME NUMBER``: one gateway, started by its daemon."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from orchestrator.config import DaemonConfig
from orchestrator.doorkeeper import Doorkeeper
from orchestrator.gateway.upstream import Upstream
from orchestrator.home import Home
from orchestrator.intake import Intake
from orchestrator.ledger import Ledger
from orchestrator.logs import log_to
from orchestrator.reception import Reception
from orchestrator.site_server import ServerKeys, add_port, site_server
from orchestrator.site_service import BulkService
from orchestrator.store import open_store
from protos import faults
from protos.allocator import use_few_arenas
from protos.bulk import add_bulk
from protos.errors import FarflungError

STOP_S = 1.0
"""How long a transfer may go on when the daemon ends; sites resume it."""


def serve(home: Home, ended: threading.Event) -> None:
    """Carry models and contributions until told to end.

    Args:
        home: The daemon's.
        ended: Set to end.
    """
    upstream = Upstream(home.path)
    opened = upstream.open()
    config = DaemonConfig.model_validate_json(opened.config)
    ledger = Ledger.open(config.ledger.url or home.ledger)
    store = open_store(config, home.store, opened.federation)
    intake = Intake(ledger, store, home.spool, upstream, upstream.check_blocks)
    doorkeeper = Doorkeeper(ledger, opened.federation)
    server = site_server(shared=True)
    reception = Reception(ledger, intake, upstream)
    add_bulk(BulkService(ledger, store, doorkeeper, reception, upstream), server)
    keys = ServerKeys(opened.key, opened.certificate, opened.authority)
    add_port(server, opened.bind, keys, "gateways.bind")
    server.start()
    print(opened.bind, flush=True)  # noqa: T201  # what the daemon waits for
    ended.wait()
    server.stop(grace=STOP_S).wait()
    upstream.close()
    ledger.close()


def main() -> None:
    """Serve until SIGTERM; at once when the daemon is gone, which sends it too."""
    home, number, daemon = Home(Path(sys.argv[1])), int(sys.argv[2]), os.getppid()
    ended = threading.Event()

    def end(*_: object) -> None:
        if os.getppid() != daemon:
            os._exit(1)  # what it has not stored, nobody will count
        ended.set()

    signal.signal(signal.SIGTERM, end)
    faults.enter("gateway")
    use_few_arenas()
    log_to(home.log, f"gateway-{number}")
    try:
        serve(home, ended)
    except FarflungError as error:
        sys.exit(error.message)
    logging.shutdown()
    os._exit(0)  # a handler that hangs must not keep the process


if __name__ == "__main__":
    main()
