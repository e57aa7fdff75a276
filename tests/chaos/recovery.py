"""How long it takes until what was killed is back, in a federation as it is in production.

The daemon: killed while contributions arrive, and started again; until it serves sites, and until it hears of
one of the contributions again. Nothing of that waits for Ray, which starts meanwhile.

A site: agent and trainer killed in the middle of an epoch, and started again; until the epoch goes on, less
what the task takes to load.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from protos.faults import Fault
from tests.chaos.arena import Arena
from tests.support.faulty import ORCHESTRATOR
from tests.support.field import SITES

BACK_S = 120.0
UPLOADS = ("contribute.heard", "status.asked", "receive.announced", "receive.settled")
"""What a daemon gets to when a site goes on with a contribution."""


@dataclass
class Recoveries:
    """Seconds since what was killed was started again.

    Attributes:
        served: Until the daemon serves sites.
        resumed: Until the daemon hears of a contribution whose arrival the kill had cut off.
        epoch: Until the site is back in its epoch.
    """

    served: list[float] = field(default_factory=list)
    resumed: list[float] = field(default_factory=list)
    epoch: list[float] = field(default_factory=list)


def recoveries(arena: Arena, shape: str) -> Recoveries:
    """A run in which the daemon and a site are killed in turn, once in a round."""
    out, run = Recoveries(), arena.launch(shape, arena.seed)
    federation = arena.ground.federation
    for done in range(
        1, arena.shapes[shape].rounds - 1
    ):  # a kill that comes late in a round has one more
        federation.await_that(
            lambda done=done: arena.told(run)[2] >= done, f"round {done}", BACK_S, revive=True
        )
        if done % 2:
            _kill_daemon(arena, out)
        else:
            _kill_site(arena, out)
    federation.wait(run, BACK_S)
    state, reason, _ = arena.told(run)
    problems = federation.client.verify(run).problems
    if state != "finished" or problems:
        raise RuntimeError(f"the run is {state}: {reason}{problems}")
    return out


def _kill_daemon(arena: Arena, out: Recoveries) -> None:
    federation = arena.ground.federation
    federation.kill(ORCHESTRATOR, at="spool.chunk.written")
    federation.await_fault(ORCHESTRATOR, BACK_S)
    began = time.monotonic()
    federation.revive(wait=False)
    out.resumed.append(_reached(arena, ORCHESTRATOR, UPLOADS, began) - began)
    out.served.append(_reached(arena, ORCHESTRATOR, ("daemon.sites.served",), began) - began)


def _kill_site(arena: Arena, out: Recoveries) -> None:
    federation, site = arena.ground.federation, arena.draw.choice(SITES)
    federation.fail(site, Fault("train.stepped", hit=arena.draw.randint(7, 10), do="stop"))
    federation.await_fault(site, BACK_S)  # its trainer stands still in the epoch
    federation.kill(site)
    began = time.monotonic()
    federation.revive()
    resumed = _reached(arena, site, ("train.resumed",), began)
    heard, loaded = (_reached(arena, site, (f"prepare.{at}",), began) for at in ("heard", "loaded"))
    out.epoch.append(resumed - began - (loaded - heard))


def _reached(arena: Arena, who: str, points: tuple[str, ...], after: float) -> float:
    """When a process of an end first got to one of some points."""
    federation = arena.ground.federation

    def found() -> list[float]:
        return [t for _, at, t in federation.timed_trace(who) if at in points and t >= after]

    federation.await_that(lambda: bool(found()), points[0], BACK_S)
    return found()[0]
