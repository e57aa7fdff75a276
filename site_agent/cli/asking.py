"""Commands that ask a running agent: ``status``, ``pause``, ``resume``, ``leave``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from site_agent.cli.options import HomeOption, JsonOption
from site_agent.cli.output import console, nbytes, print_json, say


def status(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Say what the agent is doing."""
    from site_agent.cli.ring import ring
    from site_agent.home import Home

    place = Home.at(home)
    place.need_joined()
    found = ring(place, "status")
    if as_json:
        print_json(found)
        return
    _print_status(found)


def _print_status(found: dict[str, Any]) -> None:
    from rich.table import Table

    from site_agent.link.network import in_words

    state = "paused" if found["paused"] else "ready"
    where = f"attached to {found['orchestrator']}"
    if not found["attached"]:
        where = f"not attached to {found['orchestrator']}: {found['problem']}"
    say(f"site {found['site']} of {found['federation']}: {state}, {where}")
    say(
        f"tasks {', '.join(found['tasks']) or 'none'}; device {found['device']}; certificate "
        f"until {found['certificate_expires'][:10]}; received {nbytes(found['received_bytes'])}, "
        f"sent {nbytes(found['sent_bytes'])}"
    )
    say(f"models and contributions: {in_words(found['network'])}")
    for way, pace in found["network"]["narrow_mbit_per_s"].items():
        say(f"the line is narrow: {way} at {pace:.2g} Mbit/s, so that control is heard in time")
    if found["round_trip_s"] is not None:
        say(f"control: a round trip takes {1000 * found['round_trip_s']:.0f} ms")
    if found["plans"]:
        table = Table("plan", "state", "done", "of", "")
        for plan in found["plans"]:
            numbers = [f"{plan[key]:.4g}" if plan["planned"] else "" for key in ("done", "planned")]
            table.add_row(plan["plan"], plan["state"], *numbers, plan["unit"])
        console().print(table)
    for entry in found["waiting"]:
        say(f"waiting to be sent: {entry['plan']} ({nbytes(entry['nbytes'])})")


def pause(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Take no new plans; what is in work is finished and sent."""
    _set_paused(home, as_json, "pause", "paused: no new plans until `farflung-site resume`")


def resume(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Take plans again."""
    _set_paused(home, as_json, "resume", "ready for plans again")


def _set_paused(home: HomeOption, as_json: bool, op: str, words: str) -> None:
    from site_agent.cli.ring import ring
    from site_agent.home import Home

    answer = ring(Home.at(home), op)
    if as_json:
        print_json(answer)
    else:
        say(words)


def leave(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take no further part in a run, and remove what this site keeps of it."""
    from site_agent.cli.ring import ring
    from site_agent.home import Home

    answer = ring(Home.at(home), "leave", run=run)
    if as_json:
        print_json(answer)
        return
    say(f"left {run}; {answer['removed']} stored contributions and states were removed")
    if not answer["told"]:
        say("The orchestrator could not be told: the site is not attached. Say it again later.")
