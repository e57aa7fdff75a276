"""A narrow line between a site and an orchestrator: three network namespaces, a router in the middle.

The bottleneck's queues are the router's, as they are in the world: a token bucket on the sender's own
interface would never fill, since the kernel holds a socket back that has much in its own queue. Run it
inside ``unshare --user --map-root-user --net``, which needs no privileges where user namespaces exist.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

INSIDE = ("unshare", "--user", "--map-root-user", "--net")
DAEMON_HOST, SITE_HOST = "10.9.2.1", "10.9.1.1"
BURST_BYTES = 4096


def possible() -> str:
    """Empty where this machine can make such a line, else why not."""
    for program in ("unshare", "nsenter", "ip", "tc"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    tbf = "tbf rate 2mbit burst 4kb limit 9kb"
    words = f"ip link add one type veth peer name two && tc qdisc add dev one root {tbf}"
    tried = subprocess.run([*INSIDE, "sh", "-c", words], capture_output=True, text=True)
    return tried.stderr.strip() if tried.returncode else ""


class Narrow:
    """The line; this process is on the orchestrator's side, at ``DAEMON_HOST``.

    Args:
        mbit_per_s: Rate in each direction.
        queue_s: How long what waits in the router may take to leave.
        congestion: Congestion control of both ends; reno fills queues as most do, and any user may choose it.
    """

    def __init__(self, mbit_per_s: float, queue_s: float, congestion: str = "reno") -> None:
        self.mbit_per_s, self.queue_s, self.congestion = mbit_per_s, queue_s, congestion
        self._holders: list[subprocess.Popen[bytes]] = []

    def at_site(self) -> tuple[str, ...]:
        """What to put before a command so that it runs on the site's side."""
        return (shutil.which("nsenter") or "nsenter", f"--net=/proc/{self._holders[0].pid}/ns/net")

    def __enter__(self) -> Narrow:
        site, router = self._hold(), self._hold()
        own = os.getpid()
        limit = BURST_BYTES + int(self.mbit_per_s * 1e6 / 8 * self.queue_s)
        tbf = f"root tbf rate {self.mbit_per_s}mbit burst {BURST_BYTES} limit {limit}"
        _do(f"ip link add d0 netns {own} type veth peer name r1 netns {router}")
        _do(f"ip link add s0 netns {site} type veth peer name r0 netns {router}")
        for pid, link, address, more in (
            (own, "d0", f"{DAEMON_HOST}/24", ["ip route add 10.9.1.0/24 via 10.9.2.2"]),
            (site, "s0", f"{SITE_HOST}/24", ["ip route add 10.9.2.0/24 via 10.9.1.2"]),
            (router, "r0", "10.9.1.2/24", [f"tc qdisc add dev r0 {tbf}"]),
            (router, "r1", "10.9.2.2/24", [f"tc qdisc add dev r1 {tbf}"]),
        ):
            _do("ip link set lo up", pid)
            # What a veth passes on in one piece of 64 KiB, no real line does.
            _do(f"ip link set {link} up gso_max_segs 1 gso_max_size 2000", pid)
            _do(f"ip address add {address} dev {link}", pid)
            for words in more:
                _do(words, pid)
        for pid, path, value in (
            (own, "tcp_congestion_control", self.congestion),
            (site, "tcp_congestion_control", self.congestion),
            (router, "ip_forward", "1"),
        ):
            _do(f"sh -c 'echo {value} >/proc/sys/net/ipv4/{path}'", pid)
        return self

    def statistics(self) -> str:
        """What the router's queues say."""
        return _do("tc -s qdisc show", self._holders[1].pid)

    def _hold(self) -> int:
        """A new namespace, which lives as long as a process in it."""
        process = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        self._holders.append(process)
        own = Path("/proc/self/ns/net").readlink()
        while Path(f"/proc/{process.pid}/ns/net").readlink() == own:
            os.sched_yield()
        return process.pid

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for process in self._holders:
            process.communicate()


def _do(words: str, pid: int | None = None) -> str:
    there = f"nsenter --net=/proc/{pid}/ns/net " if pid is not None else ""
    done = subprocess.run(["sh", "-c", there + words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{there}{words}: {done.stderr.strip()}")
    return done.stdout
