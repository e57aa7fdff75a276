"""The home folder of a daemon: keys, configuration, ledger, store, socket, lock.

keys/            0700: the authority's and the server's keys; hidden from Ray and plug-ins
run/             0700: operator.sock, the way in for the command line and the page
farflung.toml    configuration
ledger.sqlite    what happened, durable
progress.sqlite  what is happening: events, progress
store/           models, states, contributions, by digest
spool/           contributions that are arriving
work/            temporary files of the round under way
log/             daemon.jsonl, compute.log
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import socket
from datetime import timedelta
from pathlib import Path
from typing import IO

from cryptography import x509

from orchestrator.config import DaemonConfig, parse_daemon
from protos.chunks import write_durably
from protos.errors import Conflict, HomeLocked, InvalidInput, NotFound
from protos.identity import (
    AUTHORITY_LIFE,
    Identity,
    Key,
    certificate_pem,
    issue,
    key_pem,
    load_certificate,
    load_key,
    new_authority,
    new_key,
)

SERVER_LIFE = timedelta(days=365)

TEMPLATE = """\
# Farflung's orchestrator. Every key has a default; unknown keys are refused.

[listen]
bind = "{bind}"          # the port that sites dial
address = "{address}"    # what join tokens tell the sites; empty: the bound address
hosts = {hosts}          # names and addresses in the server's certificate

[dashboard]
port = {dashboard}       # on loopback; 0 takes a free one, -1 turns the page off

# [gateways]
# processes = 4          # carry models and contributions in the daemon's place, on a port of theirs
# bind = "0.0.0.0:8472"  # by default 8472 of the host of listen.bind
# address = ""           # what sites dial for it, where a balancer stands in front

[sites]
heartbeat_s = 2.0        # a site is gone after three missed ones
token_valid_s = 86400    # life of a join token

[ray]
cpus = 0                 # 0: all but one
# private_networks = []  # only where Ray can't be confined: networks on which it may listen

[plugins]
seconds = 600            # limits of distillation and calibration at the orchestrator
memory_bytes = 8_589_934_592

[retention]
models = "all"           # or n: models of the last n rounds; newest and best always stay
contributions = 1

# Tasks that this orchestrator has too: for `init = {{ from = "task" }}` and for plug-ins.
# [tasks.digits]
# source = "tasks/digits.py:Digits"
# settings = {{}}
"""


class Home:
    """A daemon's folder.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self.keys = self.path / "keys"
        self.run = self.path / "run"
        self.socket = self.run / "operator.sock"
        self.config_file = self.path / "farflung.toml"
        self.ledger = self.path / "ledger.sqlite"
        self.progress = self.path / "progress.sqlite"
        self.store = self.path / "store"
        self.spool = self.path / "spool"
        self.work = self.path / "work"
        self.log = self.path / "log"

    @classmethod
    def create(
        cls,
        path: Path,
        address: str = "",
        hosts: tuple[str, ...] = (),
        bind: str = "",
        dashboard_port: int = 8471,
        federation: str = "",
    ) -> Home:
        """Make a home with a new certificate authority and a commented configuration.

        Args:
            path: The folder; may exist, but must not hold a home.
            address: host:port that sites dial; its host is added to ``hosts``.
            hosts: Further names and addresses of the server.
            bind: host:port to listen on; by default the address's port on all interfaces, or
                loopback where no address is given.
            dashboard_port: Port of the page.
            federation: Id of the federation; by default a random one.

        Raises:
            Conflict: The folder holds a home already.
            InvalidInput: An address is not host:port.
        """
        home = cls(path)
        if home.config_file.exists() or home.keys.exists():
            raise Conflict(f"home: {home.path} holds a federation already; choose another --home")
        names = ["localhost", "127.0.0.1", socket.gethostname(), *hosts]
        if address:
            host, port = split_address(address)
            names.insert(0, host)
            bind = bind or f"0.0.0.0:{port}"
        bind = bind or "127.0.0.1:8470"
        split_address(bind)
        text = TEMPLATE.format(
            bind=bind,
            address=address,
            hosts="[" + ", ".join(f'"{n}"' for n in dict.fromkeys(names)) + "]",
            dashboard=dashboard_port,
        )
        parse_daemon(text)  # before anything is made: a slip can then be put right
        for folder in (home.path, home.keys, home.run):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.chmod(0o700)
        home.make_folders()
        federation = federation or f"f-{secrets.token_hex(6)}"
        key, certificate = new_authority(federation)
        write_durably(home.keys / "ca.key", key_pem(key), 0o600)
        write_durably(home.keys / "ca.pem", certificate_pem(certificate), 0o644)
        write_durably(home.keys / "federation", federation.encode(), 0o644)
        write_durably(home.config_file, text.encode())
        return home

    def make_folders(self) -> None:
        """Make the folders that may be missing in a restored home."""
        for folder in (self.run, self.store, self.spool, self.work, self.log):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def require(self) -> None:
        """Check that this is a home.

        Raises:
            NotFound: It is not.
        """
        if not self.config_file.is_file():
            raise NotFound(f"home: {self.path} is not a home; make one with `farflung init`")

    @property
    def config(self) -> DaemonConfig:
        """The configuration.

        Raises:
            ConfigInvalid: A key is wrong; says which.
        """
        self.require()
        return parse_daemon(self.config_file.read_text(), str(self.config_file))

    @property
    def federation(self) -> str:
        """Id of the federation."""
        self.require()
        return (self.keys / "federation").read_text().strip()

    def authority(self) -> tuple[Key, x509.Certificate]:
        """The authority's key and certificate."""
        return (
            load_key((self.keys / "ca.key").read_bytes()),
            load_certificate((self.keys / "ca.pem").read_bytes()),
        )

    def server_certificate(self, hosts: tuple[str, ...]) -> tuple[bytes, bytes]:
        """A fresh server key and certificate (PEM), signed by the authority."""
        key = new_key()
        identity = Identity(self.federation, "orchestrator", "orchestrator")
        life = min(SERVER_LIFE, AUTHORITY_LIFE)
        certificate = issue(self.authority(), key.public_key(), identity, life, hosts)
        return key_pem(key), certificate_pem(certificate)

    def lock(self) -> IO[str]:
        """Hold the home until the file is closed or the process ends.

        Raises:
            HomeLocked: Another daemon holds it.
        """
        file = (self.path / "lock").open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip()
            file.close()
            raise HomeLocked(
                f"home: {self.path} is in use by process {holder or 'unknown'}; "
                "one daemon serves a home",
                process=holder,
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "host:port" or "[v6]:port".

    Raises:
        InvalidInput: It is neither.
    """
    host, colon, port = address.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise InvalidInput(f'address: "{address}" is not host:port')
    return host, int(port)
