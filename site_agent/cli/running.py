"""``farflung-site run``."""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
from typing import Any

from site_agent.cli.options import HomeOption, JsonOption

END_S = 75.0
"""An agent that was told to end and has not by then is ended; nothing is lost, as after a kill."""


def run(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Be the agent: stay attached, train when asked, until Ctrl-C or SIGTERM.

    It takes up a changed site.toml by itself, on SIGHUP at once.
    """
    from protos import faults
    from protos.allocator import use_few_arenas
    from protos.distribution import check_distribution
    from site_agent.config import SiteConfig
    from site_agent.home import Home, HomeLock
    from site_agent.link.agent import Agent

    faults.enter("link")
    use_few_arenas()
    check_distribution()
    place = Home.at(home)
    place.need_joined()
    config = SiteConfig.load(place.config)
    with HomeLock(place):
        agent = Agent(place, config, _print_json if as_json else _print_words)

        def end(*_: object) -> None:
            # By a thread of its own that needs no lock of ours: says on stderr where each one hangs.
            faulthandler.dump_traceback_later(END_S, exit=True)
            agent.stop()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, end)
        signal.signal(signal.SIGHUP, lambda *_: agent.reread())
        agent.run()


def _print_json(line: dict[str, Any]) -> None:
    _write(json.dumps(line, ensure_ascii=False, default=str))


def _print_words(line: dict[str, Any]) -> None:
    """One line of the log for people: time, what happened, and the facts that tell runs apart."""
    time = str(line["time"])[11:19]
    facts = " ".join(
        f"{key}={_short(value)}"
        for key, value in line.items()
        if key not in ("time", "level", "site", "event", "packages", "traceback")
    )
    mark = {"info": "", "warning": "! ", "error": "!! "}[line["level"]]
    _write(f"{time} {line['site']}: {mark}{line['event']} {facts}".rstrip())


def _short(value: object) -> str:
    text = str(value)
    is_digest = len(text) == 64 and " " not in text
    return text[:12] if is_digest else text


def _write(text: str) -> None:
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError:
        pass  # nobody reads; the log file has it
