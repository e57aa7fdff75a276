"""Asks the agent that runs on a home."""

from __future__ import annotations

import json
import os
import socket
from typing import Any

from protos.errors import Unavailable, by_name
from site_agent.home import Home

TIMEOUT_S = 10.0


def ring(home: Home, op: str, **arguments: Any) -> dict[str, Any]:
    """The agent's answer.

    Raises:
        Unavailable: No agent runs there.
        FarflungError: What the agent says is wrong.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT_S)
    with connection:
        try:
            folder = os.open(home.root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            raise Unavailable(f"{home.root}: there is no such folder") from None
        try:
            connection.connect(f"/proc/self/fd/{folder}/{home.socket.name}")
        except OSError:
            raise Unavailable(
                f"{home.root}: no agent runs here; start it with `farflung-site run`"
            ) from None
        finally:
            os.close(folder)
        with connection.makefile("rwb") as lines:
            lines.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            lines.flush()
            reply = json.loads(lines.readline() or b"{}")
    if "error" in reply:
        raise by_name(reply["error"])(reply["message"])
    if "ok" not in reply:
        raise Unavailable(f"{home.root}: the agent went away")
    answer: dict[str, Any] = reply["ok"]
    return answer
