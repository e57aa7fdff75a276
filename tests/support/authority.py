"""A federation's authority for tests, with everything that it may or may not have signed."""

from __future__ import annotations

from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from orchestrator.doorkeeper import Caller
from protos.identity import (
    Identity,
    Key,
    Role,
    certificate_pem,
    fingerprint,
    identity_of,
    issue,
    key_pem,
    new_authority,
    new_key,
)

DAY = timedelta(days=1)


class Authority:
    """A certificate authority.

    Args:
        federation: Its federation's id.
    """

    def __init__(self, federation: str = "f-test") -> None:
        self.federation = federation
        self.key, self.certificate = new_authority(federation)

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return certificate_pem(self.certificate)

    def leaf(
        self,
        name: str,
        role: Role = "site",
        life: timedelta = DAY,
        federation: str = "",
        hosts: tuple[str, ...] = (),
        now: datetime | None = None,
    ) -> tuple[Key, x509.Certificate]:
        """A key and a certificate for it."""
        key = new_key()
        identity = Identity(federation or self.federation, role, name)
        pair = (self.key, self.certificate)
        return key, issue(pair, key.public_key(), identity, life, hosts, now)

    def pems(self, name: str, role: Role = "site", **more: str) -> tuple[bytes, bytes]:
        """The same as text: (key, certificate)."""
        key, certificate = self.leaf(name, role, federation=more.get("federation", ""))
        return key_pem(key), certificate_pem(certificate)

    def caller(self, name: str) -> tuple[Key, Caller]:
        """A site as the doorkeeper sees it, and its key."""
        key, certificate = self.leaf(name)
        return key, Caller(identity_of(certificate), certificate, fingerprint(certificate))

    def certificate_with(self, names: list[x509.GeneralName] | None) -> x509.Certificate:
        """A certificate with any alternative names, or with none at all."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "north")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.certificate.subject)
            .public_key(new_key().public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.certificate.not_valid_before_utc)
            .not_valid_after(self.certificate.not_valid_before_utc + DAY)
        )
        if names is not None:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, hashes.SHA256())


def other_curve() -> ec.EllipticCurvePrivateKey:
    """A key that is not on P-256."""
    return ec.generate_private_key(ec.SECP384R1())
