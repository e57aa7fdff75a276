"""Sites in the ledger: invitations, certificates, who is let in."""

from __future__ import annotations

import sqlalchemy as sa

from orchestrator.ledger import tables
from orchestrator.ledger.database import Database
from orchestrator.ledger.near import not_found
from orchestrator.ledger.rows import CertificateRow, SiteRow, TokenRow
from orchestrator.ledger.statement import Statement
from protos.errors import Conflict, NotEnrolled, TokenUsed

SITES, TOKENS, CERTIFICATES = tables.sites, tables.tokens, tables.certificates

_ONE = sa.select(CERTIFICATES).where(CERTIFICATES.c.fingerprint == sa.bindparam("the_fingerprint"))
_CERTIFICATE, _LOCK = Statement(_ONE), Statement(_ONE.with_for_update())
_BY_NAME = Statement(sa.select(SITES).order_by(SITES.c.name))


class Sites(Database):
    """The part of the ledger that knows who is who."""

    def invite(self, site: str, token_id: str, expires: float) -> None:
        """Record a join token for a site, new or known; takes back its earlier unused tokens.

        A site that is enrolled goes on working until the token is used.

        Raises:
            Conflict: There is a token of that id.
        """
        now = self._clock()
        with self._writing() as db:
            if db.scalar(sa.select(TOKENS.c.id).where(TOKENS.c.id == token_id)) is not None:
                raise Conflict(f"token {token_id}: there is one of that id")
            found = db.scalar(sa.select(SITES.c.state).where(SITES.c.name == site))
            if found is None:
                new = {"name": site, "state": "invited", "fingerprint": "", "created": now}
                db.execute(sa.insert(SITES).values(new))
            elif found == "revoked":
                db.execute(sa.update(SITES).where(SITES.c.name == site).values(state="invited"))
            _take_tokens_back(db, site, now)
            db.execute(
                sa.insert(TOKENS).values(
                    id=token_id, site=site, created=now, expires=expires, fingerprint=""
                )
            )

    def token(self, token_id: str) -> TokenRow | None:
        """A join token, whatever became of it; None for an unknown one.

        Before it is used: which name to certify. Afterwards: for a request that comes again
        because its first answer got lost (the same key may have the same certificate again).
        """
        with self._reading() as db:
            return _token(db, token_id)

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
        now = self._clock()
        with self._writing() as db:
            found = _token(db, token_id, lock=True)
            if found is None:
                raise TokenUsed("join token: not one of this federation")
            again = f"Ask the operator for a new one: `farflung invite {found.site}`."
            if site is not None and site != found.site:
                raise TokenUsed(f"join token: it is for site {found.site}, not {site}. {again}")
            if found.used is not None:
                raise TokenUsed(f"join token of site {found.site}: it was used before. {again}")
            if found.revoked:
                raise TokenUsed(f"join token of site {found.site}: it was taken back. {again}")
            if found.expires <= now:
                raise TokenUsed(f"join token of site {found.site}: it has expired. {again}")
            db.execute(
                sa.update(TOKENS)
                .where(TOKENS.c.id == token_id)
                .values(used=now, fingerprint=fingerprint)
            )
            _revoke_certificates(db, found.site, now)
            _certify(db, found.site, fingerprint, certificate_pem, expires, now)
            return found.site

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
        now = self._clock()
        with self._writing() as db:
            old = _certificate(db, old_fingerprint, lock=True)
            if old is None or old.site != site or old.revoked is not None or old.expires <= now:
                raise NotEnrolled(
                    f"site {site}: the certificate that asks for renewal is not allowed (any more)."
                    f" Invite it again: `farflung invite {site}`."
                )
            new = _certificate(db, new_fingerprint)
            if new is None:
                _certify(db, site, new_fingerprint, certificate_pem, expires, now)
            elif new.site != site or new.revoked is not None:
                raise NotEnrolled(f"site {site}: the new certificate is not allowed")

    def revoke(self, site: str) -> None:
        """Shut a site out: its certificates and its unused tokens.

        Raises:
            NotFound: There is no such site.
        """
        now = self._clock()
        with self._writing() as db:
            done = db.execute(sa.update(SITES).where(SITES.c.name == site).values(state="revoked"))
            if not done.rowcount:
                raise not_found("site", site, list(db.scalars(sa.select(SITES.c.name))))
            _take_tokens_back(db, site, now)
            _revoke_certificates(db, site, now)

    def sites(self) -> list[SiteRow]:
        """All sites by name."""
        with self._reading() as db:
            return [SiteRow(*row) for row in _BY_NAME.all(db, {})]

    def site(self, name: str) -> SiteRow:
        """One site.

        Raises:
            NotFound: There is no such site; the message names near matches.
        """
        with self._reading() as db:
            row = db.execute(sa.select(SITES).where(SITES.c.name == name)).first()
            if row is None:
                raise not_found("site", name, list(db.scalars(sa.select(SITES.c.name))))
            return SiteRow(*row)

    def certificate(self, fingerprint: str) -> CertificateRow | None:
        """A certificate that was recorded, whatever became of it."""
        with self._reading() as db:
            return _certificate(db, fingerprint)

    def allowed(self, fingerprint: str) -> str | None:
        """Whose certificate it is, if it lets its holder in now: neither revoked nor expired."""
        with self._reading() as db:
            found = _certificate(db, fingerprint)
        if found is None or found.revoked is not None or found.expires <= self._clock():
            return None
        return found.site


def _token(db: sa.Connection, token_id: str, lock: bool = False) -> TokenRow | None:
    query = sa.select(TOKENS).where(TOKENS.c.id == token_id)
    row = db.execute(query.with_for_update() if lock else query).first()
    if row is None:
        return None
    return TokenRow(
        row.id,
        row.site,
        row.created,
        row.expires,
        row.used,
        row.fingerprint,
        row.revoked is not None,
    )


def _certificate(db: sa.Connection, fingerprint: str, lock: bool = False) -> CertificateRow | None:
    row = (_LOCK if lock else _CERTIFICATE).first(db, {"the_fingerprint": fingerprint})
    return None if row is None else CertificateRow(*row)


def _certify(
    db: sa.Connection, site: str, fingerprint: str, pem: bytes, expires: float, now: float
) -> None:
    db.execute(
        sa.insert(CERTIFICATES).values(
            fingerprint=fingerprint, site=site, pem=pem, issued=now, expires=expires
        )
    )
    db.execute(
        sa.update(SITES)
        .where(SITES.c.name == site)
        .values(state="enrolled", fingerprint=fingerprint, certificate_expires=expires)
    )


def _revoke_certificates(db: sa.Connection, site: str, now: float) -> None:
    open_ones = (CERTIFICATES.c.site == site) & CERTIFICATES.c.revoked.is_(None)
    db.execute(sa.update(CERTIFICATES).where(open_ones).values(revoked=now))


def _take_tokens_back(db: sa.Connection, site: str, now: float) -> None:
    unused = (TOKENS.c.site == site) & TOKENS.c.used.is_(None) & TOKENS.c.revoked.is_(None)
    db.execute(sa.update(TOKENS).where(unused).values(revoked=now))
