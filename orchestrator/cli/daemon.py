"""`farflung init` and `farflung serve`."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Home, Json, home_path
from orchestrator.cli.output import print_json, print_json_line, say


def init(
    address: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Where sites reach the daemon; join tokens carry it. This machine only if empty.",
            show_default=False,
        ),
    ] = "",
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Make a home folder: a certificate authority of its own, and a commented configuration.

    Example: `farflung init --address train.example.org:8470`
    """
    from orchestrator.home import Home as Folder

    made = Folder.create(home_path(home), address)
    listen = made.config.listen
    reached = listen.address or listen.bind
    if as_json:
        print_json({"home": str(made.path), "address": reached})
        return
    say(f"Made {made.path}; sites will reach it at {reached}.")
    say("Next: `farflung serve` in one terminal, `farflung invite SITE` in another.")


def serve(home: Home = None, as_json: Json = False) -> None:
    """Run the daemon in the foreground until SIGTERM or Ctrl-C; runs go on at the next start.

    Example: `farflung serve --home /srv/farflung`
    """
    import os

    from orchestrator import views
    from orchestrator.daemon import serve as run_daemon
    from protos import faults
    from protos.allocator import use_few_arenas
    from protos.distribution import check_distribution

    faults.enter("daemon")
    use_few_arenas()
    check_distribution()

    def ready(daemon: views.Daemon) -> None:
        if as_json:
            print_json_line(
                {
                    "event": "ready",
                    "address": daemon.address,
                    "dashboard": daemon.dashboard,
                    "home": daemon.home,
                    "pid": os.getpid(),
                }
            )
            return
        page = f" · page: {daemon.dashboard}" if daemon.dashboard else ""
        say(f"sites: {daemon.address}{page}")

    run_daemon(home_path(home), ready)
