"""Whose signature is it? Certificates against the authority, signatures against certificates."""

from __future__ import annotations

from typing import Any

from cryptography import x509

from orchestrator.ledger.rows import Entry
from orchestrator.ledger.signatures import ENTRY_DOMAIN, SEAL_DOMAIN, entry_statement, holds
from protos.contribution import Header
from protos.digest import digest
from protos.identity import Identity, check_issued, check_valid, fingerprint, verify_header


class Wrong(Exception):
    """What is wrong with an entry, and the site that it is about."""

    def __init__(self, text: str, site: str = "") -> None:
        super().__init__(text)
        self.site = site


def from_hex(text: str) -> bytes:
    """Bytes from the one way to write them.

    Raises:
        ValueError: It is another way, or none.
    """
    data = bytes.fromhex(text)
    if data.hex() != text:
        raise ValueError("not lower-case hexadecimal")
    return data


class Notary:
    """Checks signatures with public keys alone.

    Args:
        authority: The federation's authority, from a source that is trusted.
        federation: Its id.
        certificates: What the authority signed, as it is claimed.

    Attributes:
        used: Fingerprints of the certificates that were asked for.
    """

    def __init__(
        self,
        authority: x509.Certificate,
        federation: str,
        certificates: list[x509.Certificate],
    ) -> None:
        self._authority, self._federation = authority, federation
        self._certificates = {fingerprint(one): one for one in certificates}
        self._said: dict[str, Identity] = {}
        self.used: set[str] = set()

    def unused(self) -> list[x509.Certificate]:
        """Certificates that nothing names."""
        return [one for name, one in self._certificates.items() if name not in self.used]

    def site(
        self,
        header: Header,
        carried: bytes,
        signature: bytes,
        told: dict[str, Any],
        time: float,
    ) -> None:
        """Check that a site signed its contribution's header.

        Args:
            header: The header.
            carried: Its bytes.
            signature: What the site is said to have signed.
            told: The entry's document.
            time: When it was accepted.
        """
        site = header.site
        if "signature" not in told:
            raise Wrong("an older version wrote it, and it is not bound to a signature", site)
        if digest(signature) != told["signature"]:
            raise Wrong("the signature is not the one that came with the contribution", site)
        name = told["certificate"]
        certificate = self._named(name, f"site {site}", site)
        if name not in self._said:
            self._said[name] = check_issued(self._authority, certificate)
        said = self._said[name]
        check_valid(certificate, time)
        if said != Identity(self._federation, "site", site):
            raise Wrong(f"its certificate is that of {said.uri}", site)
        if not verify_header(certificate, signature, carried, header.plan_id, site):
            raise Wrong("the site did not sign this header for this plan", site)

    def committed(self, entry: Entry, signed: dict[str, Any]) -> None:
        """Check the orchestrator's signature of an entry."""
        if set(signed) != {"time", "certificate", "signature"}:
            raise Wrong("its signature is not of the form that one has")
        certificate = self._named(signed["certificate"], "the orchestrator")
        value = from_hex(signed["signature"])
        if not holds(
            self._authority, certificate, self._federation, ENTRY_DOMAIN, entry_statement(entry),
            signed["time"], value,
        ):  # fmt: skip
            raise Wrong("the orchestrator's signature does not hold for it")

    def sealed(self, statement: dict[str, object], seal: dict[str, Any]) -> bool:
        """Whether the orchestrator sealed a transcript."""
        certificate = x509.load_der_x509_certificate(from_hex(seal["certificate"]))
        value = from_hex(seal["signature"])
        return holds(
            self._authority, certificate, self._federation, SEAL_DOMAIN, statement, seal["time"],
            value,
        )  # fmt: skip

    def _named(self, name: str, whose: str, site: str = "") -> x509.Certificate:
        self.used.add(name)
        if name not in self._certificates:
            raise Wrong(f"the certificate of {whose} is missing", site)
        return self._certificates[name]
