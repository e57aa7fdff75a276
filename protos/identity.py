"""Who is who: the federation's authority, certificates with a SPIFFE URI, join tokens, signatures.

Keys are ECDSA on P-256. The authority signs leaves whose only subject alternative names are a
SPIFFE URI that says the role, ``spiffe://FEDERATION/ROLE/NAME`` with ROLE ``orchestrator``,
``site``, ``bootstrap`` or ``ledger``, and for the orchestrator the host names it is reached under.
Access is decided on the URI and on the certificate's fingerprint, never on the common name. A
``ledger`` certificate opens no door: its key, Ed25519, signs what the orchestrator has committed.
"""

from __future__ import annotations

import base64
import ipaddress
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from protos.digest import canonical, digest
from protos.errors import InvalidInput, NotEnrolled

Role = Literal["orchestrator", "site", "bootstrap", "ledger"]
ROLES: tuple[Role, ...] = ("orchestrator", "site", "bootstrap", "ledger")
Key = ec.EllipticCurvePrivateKey

AUTHORITY_LIFE = timedelta(days=3650)
SITE_LIFE = timedelta(days=90)
CLOCK_SKEW = timedelta(minutes=10)
"""Certificates start this much in the past, for sites whose clocks are behind."""

SIGNATURE_DOMAIN = b"farflung.v1 contribution\x00"
PURPOSES = {
    "orchestrator": ExtendedKeyUsageOID.SERVER_AUTH,
    "ledger": x509.ObjectIdentifier("1.3.6.1.5.5.7.3.36"),  # signing of documents, RFC 9336
}
"""What a role's certificate is for; of those that are not here, to call."""
TOKEN_PREFIX = "farflung-join-1."
MAX_TOKEN_CHARS = 16_384
CHECKSUM_BYTES = 6
"""Against a slip of the hand, not against anybody: a token with another address is as good as this one."""


@dataclass(frozen=True)
class Identity:
    """What a verified certificate says.

    Attributes:
        federation: Id of the federation.
        role: orchestrator, site, bootstrap or ledger.
        name: Site name, token id, or "orchestrator".
    """

    federation: str
    role: Role
    name: str

    @property
    def uri(self) -> str:
        """The SPIFFE URI."""
        return f"spiffe://{self.federation}/{self.role}/{self.name}"

    @classmethod
    def parse(cls, uri: str) -> Identity:
        """The identity of a SPIFFE URI.

        Raises:
            NotEnrolled: It isn't one of ours.
        """
        parts = uri.removeprefix("spiffe://").split("/")
        if not uri.startswith("spiffe://") or len(parts) != 3 or not all(parts):
            raise NotEnrolled(f"certificate: {uri!r} is not an identity of a federation")
        federation, role, name = parts
        if role not in ROLES:
            raise NotEnrolled(f"certificate: unknown role {role!r}")
        return cls(federation, role, name)


def new_key() -> Key:
    """A new private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """A private key as unencrypted PKCS#8 PEM; the caller guards the file."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def load_key(pem: bytes) -> Key:
    """The private key of a PEM.

    Raises:
        InvalidInput: It is not an ECDSA P-256 key.
    """
    try:
        key = serialization.load_pem_private_key(pem, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InvalidInput(f"key: not a PEM private key ({type(error).__name__})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise InvalidInput("key: an ECDSA P-256 key is needed")
    return key


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def load_certificate(pem: bytes) -> x509.Certificate:
    """The certificate of a PEM.

    Raises:
        InvalidInput: It is not a certificate.
    """
    try:
        return x509.load_pem_x509_certificate(pem)
    except (ValueError, x509.InvalidVersion):
        raise InvalidInput("certificate: not a PEM certificate") from None


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of the certificate, hexadecimal: the name under which it is allowed or revoked."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def new_authority(federation: str, now: datetime | None = None) -> tuple[Key, x509.Certificate]:
    """A new certificate authority for a federation."""
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"farflung {federation}"[:64])])
    start = (now or datetime.now(UTC)) - CLOCK_SKEW
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def signing_request(key: Key) -> bytes:
    """A signing request (PEM) that proves possession of the key; the authority decides the name."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "farflung site")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject)
    return request.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def requested_key(pem: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a signing request whose proof of possession holds.

    Raises:
        InvalidInput: Not a request, a wrong signature, or not ECDSA P-256.
    """
    if len(pem) > 16_384:
        raise InvalidInput("signing request: larger than 16 KiB")
    try:
        request = x509.load_pem_x509_csr(pem)
        key = request.public_key()
        proven = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, x509.InvalidVersion):
        raise InvalidInput("signing request: not a PEM request with a key that is known") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise InvalidInput("signing request: an ECDSA P-256 key is needed")
    if not proven:
        raise InvalidInput("signing request: its signature does not hold")
    return key


def issue(
    authority: tuple[Key, x509.Certificate],
    key: ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey,
    identity: Identity,
    life: timedelta,
    hosts: tuple[str, ...] = (),
    now: datetime | None = None,
) -> x509.Certificate:
    """A leaf certificate for a public key.

    Args:
        authority: The authority's key and certificate.
        key: The public key that is certified.
        identity: What the certificate says.
        life: How long it is valid.
        hosts: DNS names and IP addresses (a server's).
        now: The time; for tests.
    """
    authority_key, authority_certificate = authority
    start = (now or datetime.now(UTC)) - CLOCK_SKEW
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    purpose = PURPOSES.get(identity.role, ExtendedKeyUsageOID.CLIENT_AUTH)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name[:64])]))
        .issuer_name(authority_certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + CLOCK_SKEW + life)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
        .sign(authority_key, hashes.SHA256())
    )


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def identity_of(certificate: x509.Certificate) -> Identity:
    """What a certificate says; its chain must have been verified (by the handshake).

    Raises:
        NotEnrolled: It carries no single SPIFFE URI of ours.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise NotEnrolled("certificate: it carries no identity") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise NotEnrolled("certificate: it must carry exactly one identity")
    return Identity.parse(uris[0])


def check_issued(authority: x509.Certificate, certificate: x509.Certificate) -> Identity:
    """What a certificate says, its chain verified here and not by a handshake.

    Raises:
        NotEnrolled: The authority did not sign it.
    """
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise NotEnrolled("certificate: this federation's authority did not sign it") from None
    return identity_of(certificate)


def check_valid(certificate: x509.Certificate, time: float) -> None:
    """Check that a certificate was valid at a time, seconds since the epoch.

    Raises:
        NotEnrolled: It was not.
    """
    when = datetime.fromtimestamp(time, UTC)
    if not certificate.not_valid_before_utc <= when <= certificate.not_valid_after_utc:
        raise NotEnrolled(f"certificate: it was not valid on {when:%Y-%m-%d %H:%M:%S} UTC")


def sign_header(key: Key, header: bytes, plan_id: str, site: str) -> bytes:
    """A signature over a header's bytes as they are carried, bound to plan and site."""
    return key.sign(_signed(header, plan_id, site), ec.ECDSA(hashes.SHA256()))


def verify_header(
    certificate: x509.Certificate, signature: bytes, header: bytes, plan_id: str, site: str
) -> bool:
    """Whether the holder of a certificate signed that header for that plan."""
    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey):
        return False
    try:
        key.verify(signature, _signed(header, plan_id, site), ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def _signed(header: bytes, plan_id: str, site: str) -> bytes:
    context = canonical({"plan": plan_id, "site": site})
    return SIGNATURE_DOMAIN + len(context).to_bytes(4, "big") + context + header


def _checksum(data: bytes) -> bytes:
    return bytes.fromhex(digest(data))[:CHECKSUM_BYTES]


@dataclass(frozen=True)
class JoinToken:
    """What an operator hands to a site, once.

    Attributes:
        address: host:port of the orchestrator.
        authority: The authority's certificate, PEM.
        certificate: A short-lived certificate that may call Enroll only, PEM.
        key: Its private key, PEM.
    """

    address: str
    authority: bytes
    certificate: bytes
    key: bytes

    def encode(self) -> str:
        """One line of text."""
        fields = [self.address, *(p.decode() for p in (self.authority, self.certificate, self.key))]
        data = json.dumps(fields).encode()
        return TOKEN_PREFIX + base64.urlsafe_b64encode(_checksum(data) + data).decode()

    @classmethod
    def decode(cls, text: str) -> JoinToken:
        """The token of a line of text.

        Raises:
            InvalidInput: It is not a join token, or was cut or altered.
        """
        text = "".join(text.split())
        problem = "join token: not complete; copy the whole line that `farflung invite` printed"
        if not text.startswith(TOKEN_PREFIX) or len(text) > MAX_TOKEN_CHARS:
            raise InvalidInput(problem)
        try:
            data = base64.b64decode(text.removeprefix(TOKEN_PREFIX), b"-_", validate=True)
            if data[:CHECKSUM_BYTES] != _checksum(data[CHECKSUM_BYTES:]):
                raise InvalidInput(problem)
            address, authority, certificate, key = json.loads(data[CHECKSUM_BYTES:])
            token = cls(address, authority.encode(), certificate.encode(), key.encode())
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise InvalidInput(problem) from None
        load_certificate(token.authority)
        load_certificate(token.certificate)
        load_key(token.key)
        return token
