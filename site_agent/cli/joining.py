"""``farflung-site join``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from site_agent.cli.options import HomeOption, JsonOption
from site_agent.cli.output import print_json, say


def join(
    token: Annotated[
        str,
        typer.Argument(
            metavar="TOKEN",
            help="The line that `farflung invite` printed; @FILE reads it from a file, - from "
            "standard input.",
        ),
    ],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take part in a federation: make a key here, and have it certified.

    A token works once. The key never leaves this folder.
    """
    from protos import faults
    from protos.chunks import write_durably
    from protos.errors import InvalidInput
    from protos.identity import JoinToken
    from site_agent.config import TEMPLATE, SiteConfig
    from site_agent.home import Home, HomeLock
    from site_agent.link import enrolment

    faults.enter("link")
    place = Home.at(home)
    if token == "-":
        token = sys.stdin.read()
    elif token.startswith("@"):
        try:
            token = Path(token[1:]).read_text(encoding="utf-8")
        except OSError as error:
            raise InvalidInput(f"join token: {token[1:]}: {error.strerror}") from None
    ticket = JoinToken.decode(token)
    config = SiteConfig.load(place.config)
    with HomeLock(place):
        keys = enrolment.join(
            ticket, place.keys, config.network.address, config.network.server_name
        )
        fresh = not place.config.exists()
        if fresh:
            write_durably(place.config, TEMPLATE.encode())
    if as_json:
        print_json(
            {
                "site": keys.site,
                "federation": keys.federation,
                "orchestrator": keys.address,
                "home": str(place.root),
                "certificate_expires": keys.expires.isoformat(),
            }
        )
        return
    say(f"This is now the site {keys.site} of the federation {keys.federation}.")
    say(f"Its certificate is valid until {keys.expires:%Y-%m-%d} and renews itself.")
    if fresh:
        say(f"Next: name your tasks in {place.config}, then `farflung-site doctor`.")
    else:
        say("Next: `farflung-site run`.")
