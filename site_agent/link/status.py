"""What `farflung-site status` shows of a running link."""

from __future__ import annotations

from typing import Any

from site_agent.link.fetcher import Fetcher
from site_agent.link.keys import Keys
from site_agent.link.line import Line
from site_agent.link.outbox import Outbox
from site_agent.link.plans import OpenPlans
from site_agent.link.sender import Sender
from site_agent.link.stream import Stream
from site_agent.link.wire import Wire


def connection(keys: Keys, wire: Wire, stream: Stream) -> dict[str, Any]:
    """With whom it speaks, and whether it can."""
    return {
        "site": keys.site,
        "federation": keys.federation,
        "orchestrator": wire.address,
        "bulk": wire.bulk_address,
        "attached": stream.attached,
        "problem": "" if stream.attached else stream.problem,
        "certificate_expires": keys.expires.isoformat(),
        "round_trip_s": stream.round_trip_s,
    }


def traffic(
    plans: OpenPlans, outbox: Outbox, fetcher: Fetcher, sender: Sender, line: Line
) -> dict[str, Any]:
    """What is asked of it, what waits to be sent, and what moved."""
    return {
        "plans": [assignment.facts() for assignment in plans.all()],
        "waiting": [entry.facts() for entry in outbox.waiting()],
        "received_bytes": fetcher.received_bytes,
        "sent_bytes": sender.sent_bytes,
        "network": line.facts(),
    }
