"""Signatures of committed rounds: who may say, later and elsewhere, that a history is this federation's.

The chain shows changes to whoever knows its newest digest; a signature over that digest shows them
to whoever knows the authority's certificate (docs/adr/0022).
"""

from __future__ import annotations

import threading
from datetime import timedelta

import sqlalchemy as sa
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from orchestrator.ledger import tables
from orchestrator.ledger.database import Database
from orchestrator.ledger.rows import Entry, SignatureRow
from orchestrator.ledger.statement import Statement
from protos.digest import canonical
from protos.errors import Conflict
from protos.identity import (
    Identity,
    Key,
    certificate_pem,
    check_issued,
    check_valid,
    fingerprint,
    issue,
)

SIGNATURES, SIGNERS = tables.signatures, tables.signers

ENTRY_DOMAIN = b"farflung.v1 committed\x00"
SEAL_DOMAIN = b"farflung.v1 ledger export\x00"
LIFE = timedelta(days=365)
RENEWED_BEFORE = timedelta(days=30)

_SIGNER = Statement(
    sa.select(SIGNERS.c.fingerprint).where(SIGNERS.c.fingerprint == sa.bindparam("the_fingerprint"))
)
_ADD_SIGNER, _ADD = Statement(sa.insert(SIGNERS)), Statement(sa.insert(SIGNATURES))


class Signer:
    """The orchestrator's own hand: a key that is in no file and ends with its process.

    Ed25519, because the same text then has one signature and no second valid form of it.

    Args:
        authority: The authority's key and certificate.
        federation: Id of the federation.

    Attributes:
        federation: As given.
    """

    def __init__(self, authority: tuple[Key, x509.Certificate], federation: str) -> None:
        self._authority, self.federation = authority, federation
        self._lock = threading.Lock()
        self._pair = self._new()

    def sign(self, domain: bytes, statement: dict[str, object], now: float) -> SignatureRow:
        """A signature over a statement, to which federation, time and certificate are added."""
        with self._lock:
            # A daemon may run for months, and a clock may be put back.
            starts, ends = _life(self._pair[1])
            if not starts <= now <= ends - RENEWED_BEFORE.total_seconds():
                self._pair = self._new()
            key, certificate = self._pair
        text = signed_text(domain, self.federation, statement, now, fingerprint(certificate))
        made = key.sign(text)
        return SignatureRow(now, fingerprint(certificate), made, certificate_pem(certificate))

    def _new(self) -> tuple[Ed25519PrivateKey, x509.Certificate]:
        key = Ed25519PrivateKey.generate()
        identity = Identity(self.federation, "ledger", "orchestrator")
        return key, issue(self._authority, key.public_key(), identity, LIFE)


def _life(certificate: x509.Certificate) -> tuple[float, float]:
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return starts.timestamp(), ends.timestamp()


class Signatures(Database):
    """The part of the ledger that keeps signatures."""

    _signer: Signer | None = None

    def sign_with(self, signer: Signer) -> None:
        """Sign what is committed from now on."""
        self._signer = signer

    def federation(self) -> str:
        """Id of the federation whose ledger this is.

        Raises:
            Conflict: See `seal`.
        """
        return self._hand().federation

    def seal(self, statement: dict[str, object]) -> SignatureRow:
        """A signature over what is said of this ledger now.

        Raises:
            Conflict: This ledger was opened to be read.
        """
        return self._hand().sign(SEAL_DOMAIN, statement, self._clock())

    def _hand(self) -> Signer:
        if self._signer is None:
            raise Conflict("ledger: it was opened without a key to sign with")
        return self._signer

    def signatures(self, run: str) -> dict[int, SignatureRow]:
        """The signatures of a run's entries, by the number of the entry."""
        s = SIGNATURES.c
        query = (
            sa.select(s.number, s.time, s.fingerprint, s.value, SIGNERS.c.pem)
            .join(SIGNERS, SIGNERS.c.fingerprint == s.fingerprint)
            .where(s.run == run)
        )
        with self._reading() as db:
            return {row.number: SignatureRow(*row[1:]) for row in db.execute(query)}

    def _sign(self, db: sa.Connection, entry: Entry) -> None:
        """Sign an entry, in the transaction that writes it."""
        if self._signer is None:
            return
        made = self._signer.sign(ENTRY_DOMAIN, entry_statement(entry), entry.time)
        if _SIGNER.first(db, {"the_fingerprint": made.fingerprint}) is None:
            _ADD_SIGNER.change(db, {"fingerprint": made.fingerprint, "pem": made.pem})
        _ADD.change(
            db,
            {
                "run": entry.run,
                "number": entry.number,
                "time": made.time,
                "fingerprint": made.fingerprint,
                "value": made.value,
            },
        )


def entry_statement(entry: Entry) -> dict[str, object]:
    """What the signature of an entry is over: its digest stands for it and for all before it."""
    return {"run": entry.run, "number": entry.number, "entry": entry.digest}


def signed_text(
    domain: bytes, federation: str, statement: dict[str, object], time: float, certificate: str
) -> bytes:
    """The bytes that are signed."""
    about = {"federation": federation, "time": time, "certificate": certificate}
    return domain + canonical({**statement, **about})


def holds(
    authority: x509.Certificate,
    certificate: x509.Certificate,
    federation: str,
    domain: bytes,
    statement: dict[str, object],
    time: float,
    value: bytes,
) -> bool:
    """Whether the orchestrator of a federation signed a statement at a time.

    Raises:
        NotEnrolled: The certificate is not the authority's, or was not valid then.
    """
    said = check_issued(authority, certificate)
    check_valid(certificate, time)
    key = certificate.public_key()
    if said != Identity(federation, "ledger", "orchestrator") or not isinstance(
        key, Ed25519PublicKey
    ):
        return False
    try:
        key.verify(
            value, signed_text(domain, federation, statement, time, fingerprint(certificate))
        )
    except InvalidSignature:
        return False
    return True
