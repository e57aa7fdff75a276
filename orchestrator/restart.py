"""What a daemon's start does about the rounds that the one before left open."""

from __future__ import annotations

import time
from collections.abc import Callable

from orchestrator.ledger import Ledger


def take_up_rounds(
    ledger: Ledger,
    last_heartbeat: float | None,
    grace_s: float,
    clock: Callable[[], float] = time.time,
) -> None:
    """Count what is finished, and put deadlines off: time with the daemon down does not count.

    The daemon took the sites' connections with it, so they have at least the grace to come back.

    Args:
        ledger: With the rounds.
        last_heartbeat: When the daemon before was last seen, in seconds since the epoch; None if never.
        grace_s: How long a round waits for a site that is gone, in seconds.
        clock: Gives the seconds since the epoch.
    """
    now = clock()
    down_s = max(0.0, now - last_heartbeat) if last_heartbeat is not None else 0.0
    for row in ledger.open_rounds():
        if row.state == "planned":
            ledger.carry_over(row.run, row.round, row.attempt)
            late_s = now + grace_s - (row.started + row.deadline_s)
            ledger.extend_deadline(row.run, row.round, row.attempt, max(down_s, late_s))
