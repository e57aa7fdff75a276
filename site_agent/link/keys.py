"""The site's private key and certificates, on disk and in hand."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from protos.chunks import sync_folder, write_durably
from protos.errors import InvalidInput, NotFound
from protos.faults import reach
from protos.identity import Key, identity_of, key_pem, load_certificate, load_key

RENEW_AFTER = 2 / 3
"""A certificate is renewed when this part of its life is over."""


@dataclass(frozen=True)
class Keys:
    """What a site proves itself with.

    Attributes:
        folder: Where it is kept.
        key: The private key.
        certificate: PEM, ours.
        authority: PEM, the federation's.
        address: host:port from the join token.
    """

    folder: Path
    key: Key
    certificate: bytes
    authority: bytes
    address: str

    @classmethod
    def load(cls, folder: Path) -> Keys:
        """The keys of a folder.

        Raises:
            NotFound: There are none.
            InvalidInput: A file is damaged; names it.
        """
        try:
            about = json.loads((folder / "identity.json").read_bytes())
            key = load_key((folder / "key.pem").read_bytes())
            certificate = (folder / "cert.pem").read_bytes()
            authority = (folder / "ca.pem").read_bytes()
            keys = cls(folder, key, certificate, authority, str(about["address"]))
            _ = keys.site
        except FileNotFoundError as error:
            raise NotFound(
                f"{folder}: {Path(error.filename).name} is missing; run `farflung-site join TOKEN`"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInput(f"{folder}: damaged ({type(error).__name__}); join again") from None
        return keys

    @property
    def leaf(self) -> x509.Certificate:
        """Our certificate."""
        return load_certificate(self.certificate)

    @property
    def site(self) -> str:
        """Our name, as the certificate says it."""
        return identity_of(self.leaf).name

    @property
    def federation(self) -> str:
        """Id of the federation, as the certificate says it."""
        return identity_of(self.leaf).federation

    @property
    def expires(self) -> datetime:
        """When our certificate ends."""
        return self.leaf.not_valid_after_utc

    def renewal(self) -> datetime:
        """When our certificate should be renewed."""
        leaf = self.leaf
        life: timedelta = leaf.not_valid_after_utc - leaf.not_valid_before_utc
        return leaf.not_valid_before_utc + life * RENEW_AFTER

    def renewal_due(self, now: datetime | None = None) -> bool:
        """Whether that is now."""
        return (now or datetime.now(UTC)) >= self.renewal()

    def renewed(self, certificate: bytes, authority: bytes) -> Keys:
        """The same key with a new certificate, stored.

        The authority goes first, since it may be a bundle of an old and a new one.
        """
        write_durably(self.folder / "ca.pem", authority, 0o600)
        write_durably(self.folder / "cert.pem", certificate, 0o600)
        return Keys(self.folder, self.key, certificate, authority, self.address)


def store(keys: Keys) -> None:
    """Put keys into their folder, all or nothing; what was there before is replaced."""
    new = keys.folder.with_name(f".{keys.folder.name}.new")
    old = keys.folder.with_name(f".{keys.folder.name}.old")
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(mode=0o700)
    write_durably(new / "key.pem", key_pem(keys.key), 0o600)
    write_durably(new / "cert.pem", keys.certificate, 0o600)
    write_durably(new / "ca.pem", keys.authority, 0o600)
    about = {"address": keys.address, "site": keys.site, "federation": keys.federation}
    write_durably(new / "identity.json", json.dumps(about, indent=2).encode() + b"\n", 0o600)
    reach("keys.written")
    if keys.folder.exists():
        os.replace(keys.folder, old)  # noqa: PTH105  # Path.replace refuses a folder that is not empty
    os.replace(new, keys.folder)  # noqa: PTH105
    reach("keys.replaced")
    sync_folder(keys.folder.parent)
    shutil.rmtree(old, ignore_errors=True)
