"""The gRPC servers that sites dial: the daemon's own, and those of its gateways."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import grpc

from orchestrator.config import DaemonConfig
from orchestrator.home import Home, split_address
from protos.bulk import READ_BUFFER
from protos.errors import Unavailable
from protos.identity import certificate_pem
from protos.rpc import ErrorInterceptor

SITE_THREADS = 512
"""A stream holds one, a transfer another; they cost nothing until they are used."""

MESSAGE_BYTES = 16 << 20

WINDOW_BYTES = 4 << 20
"""What a site may send ahead of what was read: 4 MiB a round trip, 1 Gbit/s at 33 ms."""

SITE_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.http2.bdp_probe", 0),  # a window that it grows on a busy machine has no bound
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    READ_BUFFER,
    ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 60_000),  # a ping queues behind megabytes on a narrow line
]


class ServerKeys(NamedTuple):
    """What a server shows, and whose certificates it accepts; all PEM.

    Attributes:
        key: Of the certificate.
        certificate: The server's own.
        authority: The authority's certificate.
    """

    key: bytes
    certificate: bytes
    authority: bytes

    @classmethod
    def of(cls, home: Home, config: DaemonConfig) -> ServerKeys:
        """Fresh ones for all names and addresses by which sites reach this orchestrator."""
        dialled = (config.listen.address, config.gateways.address)
        bound = (config.listen.bind, config.gateways.bind)
        hosts = [split_address(a)[0] for a in dialled if a]
        hosts += [*config.listen.hosts, *(split_address(a)[0] for a in bound if a)]
        pair = home.server_certificate(tuple(dict.fromkeys(hosts)))
        return cls(*pair, certificate_pem(home.authority()[1]))


def site_server(shared: bool = False) -> grpc.Server:
    """A server without a port.

    Args:
        shared: Whether it has its port in common with other processes; otherwise a second server
            on it is an error.
    """
    return grpc.server(
        ThreadPoolExecutor(SITE_THREADS, thread_name_prefix="site-rpc"),
        interceptors=[ErrorInterceptor()],
        options=[("grpc.so_reuseport", int(shared)), *SITE_OPTIONS],
    )


def add_port(server: grpc.Server, bind: str, keys: ServerKeys, key: str) -> int:
    """Let a server listen for callers with a certificate of the federation; gives the port.

    Args:
        server: Before its start.
        bind: host:port.
        keys: See `ServerKeys`.
        key: Of the configuration, for the message.

    Raises:
        Unavailable: The port is taken.
    """
    credentials = grpc.ssl_server_credentials(
        [(keys.key, keys.certificate)],
        root_certificates=keys.authority,
        require_client_auth=True,
    )
    try:
        return int(server.add_secure_port(bind, credentials))
    except RuntimeError:
        raise Unavailable(
            f"{key}: {bind} can't be bound; is another server there?", key=key
        ) from None
