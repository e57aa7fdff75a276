"""Connections to the orchestrator: mutual TLS, dialled from here, one for control and one for bulk."""

from __future__ import annotations

import random
import re
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc

from protos.bulk import READ_BUFFER
from protos.errors import FarflungError, InvalidInput, NotEnrolled, Unavailable
from protos.identity import key_pem
from site_agent.config import NetworkSection
from site_agent.link.keys import Keys

MESSAGE_BYTES = 16 << 20
WINDOW_BYTES = 16 << 20
"""What the orchestrator may send ahead of what was written here: 160 MB/s where a round trip takes 0.1 s.
By itself gRPC lets it grow with what a busy machine leaves lying: to 280 MB of a model of 400 MB."""
KEEPALIVE_MS = 30_000
CONTROL_TIMEOUT_MS, BULK_TIMEOUT_MS = 10_000, 60_000
"""How long a ping may take. On a bulk connection it queues behind megabytes on a narrow line."""

PROBE_S = 5.0

Options = list[tuple[str, str | int]]


def channel_options(
    address: str, server_name: str = "", timeout_ms: int = CONTROL_TIMEOUT_MS
) -> Options:
    """What all connections have in common."""
    options: Options = [
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        # Without it, channels to one address share one TCP connection.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    if is_loopback(address):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def is_loopback(address: str) -> bool:
    """Whether an address is this machine's own."""
    host = host_of(address)
    return host == "localhost" or host.startswith("127.") or host == "::1"


def host_of(address: str) -> str:
    """The host of host:port."""
    return address.rpartition(":")[0].strip("[]")


def dial(
    address: str,
    key: bytes,
    certificate: bytes,
    authority: bytes,
    server_name: str = "",
    options: Options | None = None,
) -> grpc.Channel:
    """A channel with a client certificate; connects when it is first used."""
    credentials = grpc.ssl_channel_credentials(authority, key, certificate)
    return grpc.secure_channel(
        address, credentials, options or channel_options(address, server_name)
    )


class Wire:
    """Makes connections with the keys of the moment.

    Args:
        keys: Gives the keys; they change when a certificate is renewed.
        network: Other addresses than the join token's and the orchestrator's own.
        valve: Gives what a bulk connection dials instead of the orchestrator; empty for nothing.
    """

    def __init__(
        self,
        keys: Callable[[], Keys],
        network: NetworkSection,
        valve: Callable[[], str] = lambda: "",
    ) -> None:
        self._keys, self._network, self._valve = keys, network, valve
        self._server_name = network.server_name
        self._bulk = ""

    @property
    def address(self) -> str:
        """host:port of the orchestrator."""
        return self._network.address or self._keys().address

    @property
    def bulk_address(self) -> str:
        """host:port for models and contributions."""
        if not self._bulk:
            return self.address
        host = self._bulk.rpartition(":")[0] or self.address.rpartition(":")[0]
        return self._network.bulk_address or f"{host}:{self._bulk.rpartition(':')[2]}"

    def move_bulk(self, place: str) -> bool:
        """Models and contributions go there from now on; whether that is somewhere else.

        Args:
            place: What the orchestrator says: host:port, ":port" for the host of `address`, or
                nothing for `address` itself.

        Raises:
            InvalidInput: It is none of these.
        """
        if not re.fullmatch(r"([^\s:]*:\d{1,5}|\[[^\s\]]+\]:\d{1,5})?", place):
            raise InvalidInput(
                f"orchestrator {self.address}: it says that models and contributions go to "
                f'"{place[:100]}", which is not host:port; its operator must correct '
                "gateways.address"
            )
        before = self.bulk_address
        self._bulk = place
        return self.bulk_address != before

    def open(self) -> grpc.Channel:
        """A connection of its own."""
        keys = self._keys()
        return dial(
            self.address,
            key_pem(keys.key),
            keys.certificate,
            keys.authority,
            self._server_name,
        )

    def open_bulk(self) -> grpc.Channel:
        """A connection for models and contributions; through the valve while a cap is set."""
        keys, valve = self._keys(), self._valve()
        address = self.bulk_address
        name = self._server_name or (host_of(address) if valve else "")
        return dial(
            valve or address,
            key_pem(keys.key),
            keys.certificate,
            keys.authority,
            options=[
                *channel_options(address, name, BULK_TIMEOUT_MS),
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
                READ_BUFFER,
            ],
        )

    def diagnose(self) -> FarflungError | None:
        """Why no connection comes about; None if one does, as far as TLS goes.

        gRPC says "Socket closed" for every refusal, so this shakes hands by hand and reads the alert.
        """
        keys = self._keys()
        if keys.expires < datetime.now(UTC):
            return NotEnrolled(
                f"site {keys.site}: its certificate expired at {keys.expires:%Y-%m-%d %H:%M} UTC, by "
                f"this machine's clock ({datetime.now(UTC):%Y-%m-%d %H:%M} UTC); where that is right, "
                "ask the operator for a new join token",
                site=keys.site,
            )
        return probe(self.address, keys.folder, keys.site, self._server_name)


def probe(address: str, folder: Path, site: str, server_name: str = "") -> FarflungError | None:
    """Shake hands with an orchestrator by hand.

    Args:
        address: host:port.
        folder: Holds key.pem, cert.pem, ca.pem.
        site: Our name.
        server_name: Name to expect; empty for the host's.

    Returns:
        Unavailable or NotEnrolled with the reason; None if the handshake succeeds.
    """
    host, port = host_of(address), address.rpartition(":")[2]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    try:
        raw = socket.create_connection((host, int(port)), timeout=PROBE_S)
    except OSError as error:
        return Unavailable(
            f"orchestrator {address}: not reachable ({error.strerror or error}); is it running, "
            "and does a firewall let this site out to that port?",
            address=address,
        )
    try:
        with raw, context.wrap_socket(raw, server_hostname=server_name or host) as connection:
            # With TLS 1.3 a server refuses a client's certificate after the handshake; an HTTP/2
            # server that accepts it speaks first.
            if connection.recv(1):
                return None
        refusal = "it closed the connection"
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in (62, 64):  # X509_V_ERR_HOSTNAME_MISMATCH, _IP_ADDRESS_MISMATCH
            return NotEnrolled(
                f"orchestrator {address}: its certificate is not for the name "
                f"{server_name or host}; set network.server_name in site.toml, or have the "
                "operator add the name to listen.hosts",
                address=address,
            )
        if error.verify_code in (9, 10):  # X509_V_ERR_CERT_NOT_YET_VALID, _HAS_EXPIRED
            return NotEnrolled(
                f"orchestrator {address}: {error.verify_message}, by this machine's clock "
                f"({datetime.now(UTC):%Y-%m-%d %H:%M} UTC); one of the two clocks is wrong, or the "
                "daemon has run for more than a year",
                address=address,
            )
        return NotEnrolled(
            f"orchestrator {address}: its certificate is from another authority than this site's "
            f"federation ({error.verify_message}); is the address right, or was the orchestrator "
            "set up anew? Then ask the operator for a new join token",
            address=address,
        )
    except TimeoutError:
        return Unavailable(f"orchestrator {address}: it does not answer", address=address)
    except (ssl.SSLEOFError, ConnectionError) as error:
        # No alert: whoever closed the connection did not speak TLS, so it is not about certificates.
        return Unavailable(
            f"orchestrator {address}: the connection is closed before it says anything "
            f"({error.strerror or type(error).__name__}); is it running behind whatever forwards "
            "that port?",
            address=address,
        )
    except (ssl.SSLError, OSError) as error:
        refusal = getattr(error, "reason", None) or error.strerror or type(error).__name__
    return NotEnrolled(
        f"orchestrator {address}: it refuses the certificate of site {site} ({refusal}): it was "
        "issued by another authority, or has expired; ask the operator for a new join token",
        address=address,
        site=site,
    )


def backoff(first_s: float = 0.2, most_s: float = 15.0) -> Iterator[float]:
    """Waits between attempts: doubling, each drawn from its upper half so that sites don't march."""
    wait = first_s
    while True:
        yield random.uniform(wait / 2, wait)
        wait = min(2 * wait, most_s)
