"""Who is calling? Decided on the certificate of the connection and on the ledger, for every call."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import grpc
from cryptography import x509

from orchestrator.ledger import Ledger
from protos.errors import NotEnrolled
from protos.identity import Identity, fingerprint, identity_of, load_certificate


class Caller(NamedTuple):
    """A verified caller.

    Attributes:
        identity: What the certificate says.
        certificate: The certificate.
        fingerprint: Its SHA-256.
    """

    identity: Identity
    certificate: x509.Certificate
    fingerprint: str


@lru_cache(maxsize=4096)
def _read(pem: bytes) -> Caller:
    certificate = load_certificate(pem)
    return Caller(identity_of(certificate), certificate, fingerprint(certificate))


class Doorkeeper:
    """Tells callers apart.

    Args:
        ledger: Knows which certificates are allowed.
        federation: Id of this federation.
    """

    def __init__(self, ledger: Ledger, federation: str) -> None:
        self._ledger = ledger
        self._federation = federation

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """The caller of an RPC; the handshake has verified the chain.

        Raises:
            NotEnrolled: No certificate, or one of another federation.
        """
        pems = context.auth_context().get("x509_pem_cert")
        if not pems:
            raise NotEnrolled("certificate: none was shown; join the federation first")
        caller = _read(bytes(pems[0]))
        if caller.identity.federation != self._federation:
            raise NotEnrolled(
                f"certificate: it is of the federation {caller.identity.federation}, "
                f"this is {self._federation}"
            )
        return caller

    def site(self, context: grpc.ServicerContext) -> Caller:
        """The calling site, whose certificate must be allowed at this moment.

        Raises:
            NotEnrolled: Not a site's certificate, revoked, expired, or replaced.
        """
        caller = self.caller(context)
        self.admit(caller)
        return caller

    def admit(self, caller: Caller) -> None:
        """Check a site's certificate against the ledger as it is at this moment.

        Raises:
            NotEnrolled: See `site`.
        """
        if caller.identity.role != "site":
            raise NotEnrolled(
                f"certificate: a {caller.identity.role} certificate may not do that; "
                "finish `farflung-site join` first"
            )
        if self._ledger.allowed(caller.fingerprint) != caller.identity.name:
            raise NotEnrolled(
                f"site {caller.identity.name}: its certificate was revoked or replaced; "
                "ask the operator for a new join token",
                site=caller.identity.name,
            )
