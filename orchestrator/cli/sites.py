"""`farflung invite`, `revoke` and `sites`."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import Home, Json, Site, operator
from orchestrator.cli.output import print_json, say


def invite(
    site: Site,
    valid_h: Annotated[
        float,
        typer.Option(
            metavar="HOURS",
            min=0.0,
            help="Hours in which the token may be used; as the configuration says if 0.",
        ),
    ] = 0.0,
    home: Home = None,
    as_json: Json = False,
) -> None:
    """Print a join token for a data center; it works once.

    It goes to standard output alone, so that it can be piped; treat it like a password.

    Example: `farflung invite north > north.token`
    """
    with operator(home) as client:
        token, expires = client.invite(site, valid_h * 3600)
    if as_json:
        print_json({"site": site, "token": token, "expires": expires})
        return
    typer.echo(token)
    typer.echo(
        f"For {site}, until {expires}. At the data center: `farflung-site join TOKEN`, then "
        "`farflung-site run`.",
        err=True,
    )


def revoke(site: Site, home: Home = None, as_json: Json = False) -> None:
    """Take a site's certificate and tokens back; it is disconnected at once.

    Example: `farflung revoke north`
    """
    with operator(home) as client:
        revoked = client.revoke(site)
    if as_json:
        print_json(revoked)
        return
    say(f"{revoked.name} is revoked. `farflung invite {revoked.name}` lets it in again.")


def list_sites(home: Home = None, as_json: Json = False) -> None:
    """List the data centers: who is attached, with which tasks.

    Example: `farflung sites`
    """
    with operator(home) as client:
        found = client.sites()
    if as_json:
        print_json(found)
        return
    if not found:
        say("No site yet: `farflung invite SITE` makes a join token for one.")
        return
    from orchestrator.cli.tables import site_table

    say(site_table(found))
