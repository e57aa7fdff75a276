"""Which TCP sockets a process tree listens on, and whether strangers could reach them.

Ray authenticates with a token and then runs pickled code, so nobody outside may reach it.
Closed off in a network namespace, or told to stay on loopback, it isn't reachable; this checks
that it is so, with the kernel's tables and not with Ray's word.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.compute.errors import ComputeExposed

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_LISTEN = "0A"  # net/tcp_states.h


@dataclass(frozen=True)
class Listener:
    """A listening socket.

    Attributes:
        address: A plain IPv4 address if the socket's is an IPv4 one in IPv6 form.
        port: Its port.
        inode: How /proc/PID/fd names the socket.
    """

    address: Address
    port: int
    inode: int


def parse(table: str) -> list[Listener]:
    """The listening sockets in the text of /proc/net/tcp or /proc/net/tcp6."""
    found = []
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN:
            host, _, port = fields[1].partition(":")
            found.append(Listener(_address(host), int(port, 16), int(fields[9])))
    return found


def _address(text: str) -> Address:
    # 32-bit words in the host's byte order, which is little-endian wherever torch runs.
    raw = b"".join(bytes.fromhex(text[i : i + 8])[::-1] for i in range(0, len(text), 8))
    address = ipaddress.ip_address(raw)
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


def listening(pids: Iterable[int] | None = None) -> list[Listener]:
    """The listening sockets of this network namespace; of ``pids`` only, if they are given."""
    found: list[Listener] = []
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            found += parse(Path(f"/proc/self/net/{name}").read_text())
    if pids is None:
        return found
    owned = {inode for pid in pids for inode in _sockets(pid)}
    return [listener for listener in found if listener.inode in owned]


def _sockets(pid: int) -> list[int]:
    inodes = []
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if match := re.fullmatch(r"socket:\[(\d+)\]", str(fd.readlink())):
                    inodes.append(int(match[1]))
    return inodes


def only_loopback_exists() -> bool:
    """Whether this network namespace has no interface that leads out."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]


def host_addresses() -> list[Address]:
    """The addresses of this host's interfaces, loopback apart."""
    found: set[Address] = set()
    with contextlib.suppress(FileNotFoundError):
        trie = Path("/proc/self/net/fib_trie").read_text()
        found.update(
            ipaddress.ip_address(address)
            for address in re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", trie)
        )
    with contextlib.suppress(FileNotFoundError):
        for line in Path("/proc/self/net/if_inet6").read_text().splitlines():
            found.add(ipaddress.IPv6Address(bytes.fromhex(line.split()[0])))
    return sorted((a for a in found if not a.is_loopback), key=lambda a: (a.version, a))


STOPPED = (
    "It was stopped. Either let the daemon create namespaces (unshare is refused on this host: allow "
    "user namespaces), or let nobody in but to the orchestrator's own port (nft add rule inet filter "
    'input iifname != "lo" tcp dport != { 22, ORCHESTRATOR_PORT } ct state new drop) and then'
)
"""What to do about a Ray of the daemon's own."""


def require_private(
    listeners: Sequence[Listener],
    hosts: Sequence[Address],
    private_networks: Sequence[str],
    remedy: str = STOPPED,
) -> None:
    """Refuses listeners that a stranger could reach.

    A socket on all addresses listens on each of ``hosts``; each must be loopback or lie in a
    private network.

    Raises:
        ComputeExposed: It names the sockets and what to do.
    """
    networks = [ipaddress.ip_network(network) for network in private_networks]

    def private(address: Address) -> bool:
        return address.is_loopback or any(address in network for network in networks)

    exposed: dict[str, Address] = {}
    for listener in listeners:
        everywhere = listener.address.is_unspecified
        for address in hosts if everywhere else [listener.address]:
            if not private(address):
                shown = "*" if everywhere else str(listener.address)
                exposed[f"{shown}:{listener.port}"] = address
                break
    if exposed:
        where = ", ".join(exposed)
        reached = ", ".join(sorted({str(address) for address in exposed.values()}))
        raise ComputeExposed(
            f"Ray listens on {where}, which others can reach at {reached}, and it runs code that "
            f"it is sent. {remedy} name the networks that you trust, for example "
            '`private_networks = ["10.0.0.0/8"]` under [ray]',
            where=where,
            reached=reached,
            uid=os.geteuid(),
        )
