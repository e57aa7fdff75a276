"""``farflung-site task``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from site_agent.cli.options import HomeOption, JsonOption
from site_agent.cli.output import print_json, say

app = typer.Typer(help="This site's tasks.", no_args_is_help=True)


@app.callback()
def _tasks() -> None: ...


@app.command("test")
def try_one(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A task of site.toml.")],
    params: Annotated[
        str, typer.Option("--params", help="Parameters of a run, as JSON.", metavar="JSON")
    ] = "{}",
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Import a task, load its data, train one step, and print its digest."""
    from protos.errors import InvalidInput
    from site_agent.config import SiteConfig
    from site_agent.home import Home
    from site_agent.trial import try_task

    place = Home.at(home)
    config = SiteConfig.load(place.config)
    try:
        given: dict[str, Any] = json.loads(params)
    except ValueError:
        raise InvalidInput("--params: not JSON") from None
    found = try_task(place, config, name, given)
    if as_json:
        print_json(found)
        return
    say(
        f"task {name}: code {found['digest'][:16]}, loaded in {found['seconds']['preparing']:.2g} s"
    )
    say(
        f"model: {found['parameters']} parameters in {found['tensors']} tensors, "
        f"{found['bytes_shared']} bytes shared; manifest {found['manifest'][:16]}"
    )
    say(
        f"data: {found['examples']} to train on, {found['val']} to validate, {found['test']} to test"
    )
    say(f"one step on {found['device']}: loss {found['loss']:.6g}")
