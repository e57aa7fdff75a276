"""Reads a transcript and says what is wrong with it, with public keys alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from cryptography import x509

from orchestrator.ledger.audit import MALFORMED, Audit
from orchestrator.ledger.notary import Notary, from_hex
from orchestrator.ledger.transcript import FORMAT, line, seal_statement
from orchestrator.views import Finding, Verification
from protos.digest import hasher
from protos.errors import FarflungError, InvalidInput
from protos.identity import fingerprint, identity_of

HEAD = {"format", "federation", "run", "certificates"}
SEAL = {"entries", "digest", "time", "certificate", "signature"}


def verify(lines: Iterable[bytes], authority: x509.Certificate) -> tuple[Verification, Audit]:
    """Check every line of a transcript; gives what was found, and what its chain tells.

    Args:
        lines: With their line feeds.
        authority: The certificate of the federation's authority, from a source that is trusted.

    Raises:
        InvalidInput: It is no transcript at all.
    """
    reader = _Reader(authority)
    for data in lines:
        reader.line(data)
    return reader.end()


class _Reader:
    def __init__(self, authority: x509.Certificate) -> None:
        self._authority = authority
        self._hash = hasher()
        self._problems: list[Finding] = []
        self._audit: Audit | None = None
        self._federation = self._run = ""
        self._sealed: float | None = None

    def line(self, data: bytes) -> None:
        """Take up the next line."""
        audit = self._audit
        if self._sealed is not None:
            return self._say("there is more after the seal", self._next())
        document = _parsed(data)
        if audit is None:
            if document is None or document.get("format") != FORMAT:
                raise InvalidInput(
                    f"not an export of a ledger, or of another version: line 1 does not say"
                    f' "{FORMAT}"'
                )
            self._head(document)
        elif document is not None and "seal" in document:
            return self._seal(document, audit)
        elif document is None:
            self._say("not one line of canonical JSON", self._next())
        else:
            audit.entry(document)
        self._hash.update(data)
        return None

    def end(self) -> tuple[Verification, Audit]:
        """There are no more lines."""
        audit = self._audit
        if audit is None:
            raise InvalidInput("not an export of a ledger: it is empty")
        audit.done()
        for certificate in audit.notary.unused():
            self._say(f"the certificate of {_whose(certificate)} belongs to no entry", 0)
        if self._sealed is None:
            text = f"the seal is missing: what came after entry {audit.number} may be cut off"
            self._say(text, self._next())
        found = Verification(
            federation=self._federation,
            run=self._run,
            entries=audit.number,
            committed=len(audit.history),
            contributions=len(audit.accepted),
            digest=audit.digest,
            sealed=self._sealed,
            problems=(*audit.problems, *self._problems),
        )
        return found, audit

    def _head(self, document: dict[str, Any]) -> None:
        try:
            if set(document) != HEAD:
                raise ValueError
            self._federation, self._run = str(document["federation"]), str(document["run"])
            found = [from_hex(text) for text in document["certificates"]]
            certificates = [x509.load_der_x509_certificate(data) for data in found]
            names = [fingerprint(one) for one in certificates]
            if names != sorted(set(names)):
                self._say("the certificates stand in another order, or one stands twice", 0)
        except MALFORMED:
            certificates = []
            self._say("the first line is not what was written: a name, or a certificate", 0)
        notary = Notary(self._authority, self._federation, certificates)
        self._audit = Audit(self._run, notary)

    def _seal(self, document: dict[str, Any], audit: Audit) -> None:
        number = self._next()
        self._sealed = 0.0
        try:
            seal = document["seal"]
            if set(document) != {"seal"} or set(seal) != SEAL:
                raise ValueError
            self._sealed = float(seal["time"])
            statement = seal_statement(self._run, seal["entries"], seal["digest"])
            good = audit.notary.sealed(statement, seal)
        except FarflungError as error:
            return self._say(f"the seal: {error.message}", number)
        except MALFORMED:
            return self._say("the seal is not what was written", number)
        if not good:
            return self._say("the seal: the orchestrator's signature does not hold", number)
        if seal["entries"] != audit.number:
            text = f"{seal['entries']} entries were sealed, the newest here is {audit.number}"
            return self._say(text, number)
        if seal["digest"] != self._hash.hexdigest():
            return self._say("the lines before are not those that were sealed", number)
        return None

    def _next(self) -> int:
        return self._audit.number + 1 if self._audit is not None else 0

    def _say(self, text: str, entry: int) -> None:
        about = f"entry {entry}" if entry else "the first line"
        self._problems.append(Finding(text=f"{about}: {text}", entry=entry))


def _parsed(data: bytes) -> dict[str, Any] | None:
    """The document of a line; None if it is not one, or not the one way to write it."""
    try:
        found = json.loads(data)
        return found if isinstance(found, dict) and line(found) == data else None
    except (ValueError, RecursionError):
        return None


def _whose(certificate: x509.Certificate) -> str:
    try:
        return identity_of(certificate).uri
    except (FarflungError, ValueError):
        return "somebody"
