"""The end of a gRPC channel."""

from __future__ import annotations

import threading

import grpc

MOST_S = 2.0
"""A channel takes a millisecond to close, or, if gRPC gets stuck, for ever."""


def hang_up(channel: grpc.Channel, wait_s: float = 0.0) -> None:
    """Close a channel, and with it its calls; not waited for long, since gRPC may take for ever.

    See https://github.com/grpc/grpc/issues/20026.

    Args:
        channel: What is closed; what does not close within the time is left behind.
        wait_s: How long to wait, in seconds. A process that ends soon after should: what is still
            closing while the interpreter goes away may bring it down.
    """
    closing = threading.Thread(target=channel.close, name="hang up", daemon=True)
    closing.start()
    closing.join(wait_s)
