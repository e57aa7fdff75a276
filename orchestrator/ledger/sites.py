"""Sites in the ledger: invitations, certificates, who is let in."""

from __future__ import annotations

from orchestrator.ledger.database import Database
from orchestrator.ledger.rows import CertificateRow, SiteRow, TokenRow


class Sites(Database):
    """The part of the ledger that knows who is who."""

    def invite(self, site: str, token_id: str, expires: float) -> None:
        """Record a join token for a site, new or known; takes back its earlier unused tokens.

        A site that is enrolled goes on working until the token is used.

        Raises:
            Conflict: There is a token of that id.
        """
        raise NotImplementedError

    def token(self, token_id: str) -> TokenRow | None:
        """A join token: before it is used for the name to certify, afterwards for a repeated
        request whose first answer got lost (same key → give ``certificate`` again)."""
        raise NotImplementedError

    def use_token(
        self,
        token_id: str,
        *,
        fingerprint: str,
        certificate_pem: bytes,
        expires: float,
        site: str | None = None,
    ) -> str:
        """Use a join token, once, and enrol its site with a certificate; gives the site's name.

        Certificates that the site had before are revoked: the one who holds the token is it.

        Args:
            token_id: The token.
            fingerprint: Of the certificate.
            certificate_pem: The certificate.
            expires: When it expires.
            site: For whom it is, to be sure; None to take the token's word.

        Raises:
            TokenUsed: It is unknown, used, expired, taken back, or another site's.
        """
        raise NotImplementedError

    def renew(
        self,
        site: str,
        old_fingerprint: str,
        new_fingerprint: str,
        certificate_pem: bytes,
        expires: float,
    ) -> None:
        """Record a site's next certificate; the previous one stays allowed until it expires.

        Renewing twice with the same new certificate is the same as once.

        Raises:
            NotEnrolled: The old certificate is not allowed (any more), or not this site's.
        """
        raise NotImplementedError

    def revoke(self, site: str) -> None:
        """Shut a site out: its certificates and its unused tokens.

        Raises:
            NotFound: There is no such site.
        """
        raise NotImplementedError

    def sites(self) -> list[SiteRow]:
        """All sites by name."""
        raise NotImplementedError

    def site(self, name: str) -> SiteRow:
        """One site.

        Raises:
            NotFound: There is no such site; the message names near matches.
        """
        raise NotImplementedError

    def certificate(self, fingerprint: str) -> CertificateRow | None:
        """A certificate that was recorded, whatever became of it."""
        raise NotImplementedError

    def allowed(self, fingerprint: str) -> str | None:
        """Whose certificate it is, if it lets its holder in now: neither revoked nor expired."""
        raise NotImplementedError
