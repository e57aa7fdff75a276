"""Who is who: nothing but the authority's own word, for exactly what it said."""

import base64
import json
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.digest import digest
from protos.errors import InvalidInput, NotEnrolled
from protos.identity import (
    CHECKSUM_BYTES,
    CLOCK_SKEW,
    TOKEN_PREFIX,
    Identity,
    JoinToken,
    certificate_pem,
    check_issued,
    check_valid,
    fingerprint,
    identity_of,
    issue,
    key_pem,
    load_certificate,
    load_key,
    new_authority,
    new_key,
    requested_key,
    sign_header,
    signing_request,
    verify_header,
)
from tests.support.authority import Authority, other_curve

AUTHORITY = Authority()
HEADER = b'{"a":1}'


def request_of(
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey,
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    hashed = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashed)
    return request.public_bytes(serialization.Encoding.PEM)


def pem(label: str, der: bytes) -> bytes:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()


# -- the authority ----------------------------------------------------------------------------------


def test_leaf_is_verified_by_the_authority_and_by_no_other() -> None:
    _, leaf = AUTHORITY.leaf("north")
    leaf.verify_directly_issued_by(AUTHORITY.certificate)
    # Of the same name, too: the key decides.
    with pytest.raises(InvalidSignature):
        leaf.verify_directly_issued_by(Authority().certificate)


def test_what_the_authority_may_sign() -> None:
    constraints = AUTHORITY.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert constraints.value == x509.BasicConstraints(ca=True, path_length=0)


@pytest.mark.parametrize(
    ("role", "purpose"),
    [
        ("site", ExtendedKeyUsageOID.CLIENT_AUTH),
        ("bootstrap", ExtendedKeyUsageOID.CLIENT_AUTH),
        ("orchestrator", ExtendedKeyUsageOID.SERVER_AUTH),
        ("ledger", x509.ObjectIdentifier("1.3.6.1.5.5.7.3.36")),
    ],
)
def test_leaf_is_no_authority_and_serves_one_purpose(
    role: str, purpose: x509.ObjectIdentifier
) -> None:
    _, leaf = AUTHORITY.leaf("x", role)  # type: ignore[arg-type]
    found = leaf.extensions
    assert found.get_extension_for_class(x509.BasicConstraints).value.ca is False
    usage = found.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert list(found.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
    assert identity_of(leaf) == Identity("f-test", role, "x")  # type: ignore[arg-type]


def test_who_signed_a_certificate_and_when_it_was_valid() -> None:
    _, leaf = AUTHORITY.leaf("x", "ledger")
    assert check_issued(AUTHORITY.certificate, leaf) == Identity("f-test", "ledger", "x")
    with pytest.raises(NotEnrolled, match="did not sign it"):
        check_issued(Authority("f-test").certificate, leaf)
    with pytest.raises(NotEnrolled, match="did not sign it"):
        check_issued(leaf, leaf)
    starts, ends = leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp()
    for time in (starts, ends):
        check_valid(leaf, time)
    for time in (starts - 1, ends + 1):
        with pytest.raises(NotEnrolled, match="it was not valid on"):
            check_valid(leaf, time)


def test_server_is_reached_under_its_names_and_addresses() -> None:
    _, leaf = AUTHORITY.leaf("o", "orchestrator", hosts=("o.example", "10.0.0.7", "fd00::2"))
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["o.example"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "fd00::2"]


def test_life_begins_a_little_before_for_clocks_that_are_behind() -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    authority = new_authority("f", now)
    identity = Identity("f", "site", "north")
    leaf = issue(authority, new_key().public_key(), identity, timedelta(hours=1), now=now)
    assert leaf.not_valid_before_utc == now - CLOCK_SKEW
    assert leaf.not_valid_after_utc == now + timedelta(hours=1)
    assert authority[1].not_valid_before_utc <= leaf.not_valid_before_utc


def test_certificate_and_key_come_back() -> None:
    key, leaf = AUTHORITY.leaf("north")
    assert load_certificate(certificate_pem(leaf)) == leaf
    assert load_key(key_pem(key)).private_numbers() == key.private_numbers()
    assert fingerprint(leaf) == leaf.fingerprint(hashes.SHA256()).hex()
    assert fingerprint(leaf) != fingerprint(AUTHORITY.leaf("north")[1])


# -- keys and signing requests ----------------------------------------------------------------------


def test_key_of_a_request_is_the_requesters() -> None:
    key = new_key()
    assert requested_key(signing_request(key)) == key.public_key()


def test_request_signed_by_another_key_is_refused() -> None:
    """Whoever asks must have the key, or he could have another's certificate."""
    mine = x509.load_pem_x509_csr(signing_request(new_key()))
    theirs = x509.load_pem_x509_csr(signing_request(new_key()))
    body, signature = mine.tbs_certrequest_bytes, theirs.signature
    bits = b"\x03" + bytes([len(signature) + 1]) + b"\x00" + signature
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")  # ecdsa-with-SHA256
    inner = body + algorithm + bits
    forged = pem(
        "CERTIFICATE REQUEST", b"\x30\x82" + len(inner).to_bytes(2, "big") + inner
        if len(inner) > 255 else b"\x30\x81" + bytes([len(inner)]) + inner,
    )  # fmt: skip
    assert not x509.load_pem_x509_csr(forged).is_signature_valid
    with pytest.raises(InvalidInput, match="signature does not hold"):
        requested_key(forged)


@pytest.mark.parametrize(
    "key",
    [
        other_curve(),
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 1024),
    ],
    ids=["P-384", "secp256k1", "Ed25519", "RSA"],
)
def test_only_p256_is_certified(
    key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey,
) -> None:
    with pytest.raises(InvalidInput, match="P-256"):
        requested_key(request_of(key))
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with pytest.raises(InvalidInput, match="P-256"):
        load_key(private)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"junk",
        b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
        AUTHORITY.pem,
        signing_request(new_key())[:200],
        b"x" * 20_000,
    ],
    ids=["nothing", "junk", "not DER", "a certificate", "cut", "large"],
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        requested_key(data)


REQUEST = base64.b64decode(b"".join(signing_request(new_key()).splitlines()[1:-1]))
UNUSED_BITS = len(REQUEST) - len(x509.load_der_x509_csr(REQUEST).signature) - 1
"""The byte that says how many bits of the signature's last byte don't count: it proves nothing."""


@settings(max_examples=300)
@given(st.integers(0, len(REQUEST) - 1), st.integers(1, 255))
def test_damaged_request_is_refused_by_name(at: int, flip: int) -> None:
    data = bytearray(REQUEST)
    data[at] ^= flip
    damaged = pem("CERTIFICATE REQUEST", bytes(data))
    if at == UNUSED_BITS:
        with suppress(InvalidInput):
            assert requested_key(damaged) == requested_key(pem("CERTIFICATE REQUEST", REQUEST))
        return
    with pytest.raises(InvalidInput):
        requested_key(damaged)


@pytest.mark.parametrize("data", [b"", b"junk", AUTHORITY.pem[:99]], ids=["nothing", "junk", "cut"])
def test_what_is_no_certificate_or_key_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput):
        load_certificate(data)
    with pytest.raises(InvalidInput):
        load_key(data)


def test_encrypted_key_is_refused() -> None:
    data = new_key().private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    with pytest.raises(InvalidInput):
        load_key(data)


# -- identities -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://",
        "spiffe://f-test/site",
        "spiffe://f-test/site/",
        "spiffe:///site/north",
        "spiffe://f-test//north",
        "spiffe://f-test/site/north/more",
        "spiffe://f-test/operator/north",
        "https://f-test/site/north",
        "SPIFFE://f-test/site/north",
        "f-test/site/north",
        "spiffe://f-test/Site/north",
    ],
)
def test_foreign_uris_are_no_identities(uri: str) -> None:
    with pytest.raises(NotEnrolled, match="certificate"):
        Identity.parse(uri)


def test_uri_comes_back() -> None:
    identity = Identity("f-test", "site", "north")
    assert identity.uri == "spiffe://f-test/site/north"
    assert Identity.parse(identity.uri) == identity


def uri(name: str) -> x509.GeneralName:
    return x509.UniformResourceIdentifier(Identity("f-test", "site", name).uri)


def test_identity_is_the_one_uri_and_not_the_common_name() -> None:
    assert identity_of(AUTHORITY.certificate_with([uri("south")])).name == "south"


@pytest.mark.parametrize(
    "names",
    [
        None,
        [],
        [uri("north"), uri("south")],
        [uri("north"), x509.UniformResourceIdentifier("https://elsewhere")],
        [x509.DNSName("north")],
    ],
    ids=["no names", "empty", "two sites", "a second URI", "a host"],
)
def test_certificate_without_exactly_one_identity_is_refused(
    names: list[x509.GeneralName] | None,
) -> None:
    with pytest.raises(NotEnrolled):
        identity_of(AUTHORITY.certificate_with(names))


# -- signatures -------------------------------------------------------------------------------------


def test_signature_is_bound_to_header_plan_and_site() -> None:
    key, leaf = AUTHORITY.leaf("north")
    signature = sign_header(key, HEADER, "r/1/1/train", "north")
    assert verify_header(leaf, signature, HEADER, "r/1/1/train", "north")
    for header, plan, site in (
        (HEADER + b" ", "r/1/1/train", "north"),
        (HEADER, "r/1/2/train", "north"),
        (HEADER, "r/1/1/train", "south"),
        # Nothing can be moved from one part into another.
        (b"h" + HEADER, "r/1/1/trai", "north"),
        (HEADER, "r/1/1/trainn", "orth"),
    ):
        assert not verify_header(leaf, signature, header, plan, site)
    assert not verify_header(AUTHORITY.leaf("north")[1], signature, HEADER, "r/1/1/train", "north")


def test_signature_says_what_it_is_for() -> None:
    """The same key signs TLS handshakes: a signature without our domain must not pass."""
    key, leaf = AUTHORITY.leaf("north")
    bare = key.sign(HEADER, ec.ECDSA(hashes.SHA256()))
    assert not verify_header(leaf, bare, HEADER, "r/1/1/train", "north")


@pytest.mark.parametrize("signature", [b"", b"\0" * 64, b"\x30\x06\x02\x01\x00\x02\x01\x00"])
def test_what_is_no_signature_does_not_hold(signature: bytes) -> None:
    _, leaf = AUTHORITY.leaf("north")
    assert not verify_header(leaf, signature, HEADER, "p", "north")


# -- join tokens ------------------------------------------------------------------------------------


def token(address: str = "o.example:8470") -> JoinToken:
    key, certificate = AUTHORITY.pems("t1", "bootstrap")
    return JoinToken(address, AUTHORITY.pem, certificate, key)


TOKEN = token()
TEXT = TOKEN.encode()


def test_token_is_one_line_and_comes_back() -> None:
    assert TEXT.split() == [TEXT]
    assert TEXT.startswith(TOKEN_PREFIX)
    assert JoinToken.decode(TEXT) == TOKEN


def test_token_survives_mail_that_wraps_lines() -> None:
    wrapped = "\n ".join(TEXT[i : i + 70] for i in range(0, len(TEXT), 70)) + "\n"
    assert JoinToken.decode(wrapped) == TOKEN


@given(st.integers(0, len(TEXT) - 1))
def test_truncated_token_is_refused(at: int) -> None:
    for cut in (TEXT[:at], TEXT[at + 1 :]):
        with pytest.raises(InvalidInput, match="join token: not complete"):
            JoinToken.decode(cut)


@settings(max_examples=300)
@given(st.integers(0, len(TEXT) - 1), st.sampled_from("Aa0_-=.+/é"))
def test_altered_token_is_refused(at: int, character: str) -> None:
    """Above all its address: a site would dial somewhere else, and not know why it fails."""
    altered = TEXT[:at] + character + TEXT[at + 1 :]
    try:
        assert JoinToken.decode(altered) == TOKEN  # the last digit has bits that say nothing
    except InvalidInput:
        return


def wrapped(data: bytes) -> str:
    """Something else as a token whose checksum holds."""
    checked = bytes.fromhex(digest(data))[:CHECKSUM_BYTES] + data
    return TOKEN_PREFIX + base64.urlsafe_b64encode(checked).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "farflung-join-1.",
        "farflung-join-2." + TEXT.removeprefix(TOKEN_PREFIX),
        TEXT.removeprefix(TOKEN_PREFIX),
        TEXT + TEXT,
        TOKEN_PREFIX + "A" * 20_000,
        wrapped(b"[]"),
        wrapped(b"[1,2,3,4]"),
        wrapped(json.dumps(["a", "b", "c", "d"]).encode()),
        wrapped(b"[" * 10_000),
        wrapped(b"\xff"),
    ],
    ids=["nothing", "prefix", "version", "no prefix", "twice", "long", "empty", "numbers", "words",
         "deep", "not text"],
)  # fmt: skip
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        JoinToken.decode(text)
