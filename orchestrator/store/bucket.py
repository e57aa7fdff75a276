"""Blobs as objects of an S3-compatible bucket, through obstore.

Large ones go up in parts and appear when the last one is there. What a killed daemon left of an
upload is not an object: the bucket's own rule for incomplete uploads removes it (docs/operations.md).
"""

from __future__ import annotations

import configparser
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from orchestrator.config import StoreSection
from orchestrator.store.blobs import Blob, Look
from orchestrator.store.cache import Cache
from protos.digest import Bytes
from protos.digest import digest as digest_of
from protos.errors import ConfigInvalid, Conflict, DataCorrupt, Unavailable
from protos.manifest import CHUNK_BYTES, Index
from protos.spares import Spares

PART_BYTES = 8 << 20
PARTS_AT_ONCE = 4
"""So much of an upload is in memory: 32 MiB, more only above 70 GB."""

MOST_PARTS = 9000
"""S3 takes 10,000."""

SIGNED_FOR = timedelta(hours=24)
"""How long readers may use a location: as long as a reduction may take."""

OWNER = "farflung"
"""The object that says whose prefix it is."""


class Bucket:
    """Blobs under a prefix of a bucket; see `Blobs`. Whole files go through a cache.

    Args:
        section: ``[store]`` of the configuration.
        folder: On this machine, for the cache.
        direct: Whether those who read ranges reach the bucket themselves; otherwise they get files.

    Raises:
        ConfigInvalid: The file with the credentials can't be read.
    """

    def __init__(self, section: StoreSection, folder: Path, *, direct: bool) -> None:
        self.url, self._direct = section.url, direct
        self._store = _opened(section)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = Cache(folder / "cache", section.cache_bytes)

    def claim(self, federation: str) -> None:
        """Make the prefix a federation's own: two daemons would collect each other's models.

        Raises:
            Conflict: It is another's.
        """
        owner = self._owner()
        if not owner:
            try:
                self._put(OWNER, federation.encode(), "create")
            except AlreadyExistsError:
                pass  # another daemon came first
            owner = self._owner()
        if owner != federation:
            raise Conflict(
                f"{self.url} belongs to another federation ({owner}); give [store] url another prefix",
                key="store.url",
            )

    def _owner(self) -> str:
        try:
            return self.get(OWNER).decode()
        except FileNotFoundError:
            return ""

    def get(self, key: str) -> bytes:
        """See `Blobs.get`."""
        with self._said(key):
            return bytes(obstore.get(self._store, key).bytes())

    def put(self, key: str, data: Bytes) -> None:
        """See `Blobs.put`."""
        self._put(key, data, "overwrite")

    def _put(self, key: str, data: Bytes, mode: Literal["create", "overwrite"]) -> None:
        with self._said(key):
            obstore.put(self._store, key, bytes(data), mode=mode, use_multipart=False)

    def put_file(self, key: str, file: Path) -> None:
        """See `Blobs.put_file`. The file goes to the cache."""
        size = file.stat().st_size
        with self._said(key):
            obstore.put(
                self._store,
                key,
                file if size else b"",
                use_multipart=size > PART_BYTES,
                chunk_size=max(PART_BYTES, -(-size // MOST_PARTS)),
                max_concurrency=PARTS_AT_ONCE,
            )
        self._cache.add(_name(key), file)

    def find(self, key: str) -> Blob | None:
        """See `Blobs.find`."""
        try:
            with self._said(key):
                head = obstore.head(self._store, key)
        except FileNotFoundError:
            return None
        return Blob(key, head["size"], head["last_modified"].timestamp())

    def read_range(self, key: str, start: int, stop: int) -> bytes:
        """See `Blobs.read_range`."""
        if start == stop:
            return b""
        try:
            with self._said(key):
                return bytes(obstore.get_range(self._store, key, start=start, end=stop))
        except _Beyond:
            return b""

    def remove(self, keys: Sequence[str]) -> None:
        """See `Blobs.remove`."""
        for key in keys:
            self._cache.drop(_name(key))
        with self._said(keys[0] if keys else ""):
            for first in range(0, len(keys), 1000):  # the most that one request takes
                obstore.delete(self._store, keys[first : first + 1000])

    def recycle(self, key: str, spares: Spares) -> None:
        """See `Blobs.recycle`."""
        if (path := self._cache.take(_name(key))) is not None:
            spares.give(path)

    def list(self, prefix: str) -> Iterator[Blob]:
        """See `Blobs.list`."""
        with self._said(prefix):
            for page in obstore.list(self._store, f"{prefix}/", chunk_size=1000):
                for meta in page:
                    yield Blob(meta["path"], meta["size"], meta["last_modified"].timestamp())

    def file(self, key: str, index: Look) -> Path:
        """See `Blobs.file`."""
        return self._cache.file(_name(key), lambda path: self._fetch(key, index(), path))

    def here(self, key: str) -> Path | None:
        """See `Blobs.here`."""
        return self._cache.find(_name(key))

    def lend(self, key: str, index: Look, folder: Path) -> Path:
        """See `Blobs.lend`."""
        return self._cache.lend(_name(key), lambda path: self._fetch(key, index(), path), folder)

    def place(self, key: str, index: Look, folder: Path) -> str:
        """See `Blobs.place`. A signed URL opens this one object and nothing else."""
        if not self._direct:
            return str(self.lend(key, index, folder))
        with self._said(key):
            return obstore.sign(self._store, "GET", key, SIGNED_FOR)

    def clean(self) -> int:
        """See `Blobs.clean`."""
        return self._cache.clear(unfinished=True)

    def spare(self) -> int:
        """See `Blobs.spare`."""
        return self._cache.clear()

    def _fetch(self, key: str, index: Index, path: Path) -> None:
        """Download an artefact, checking every chunk as it comes."""
        pending = bytearray()
        done = 0
        with self._said(key), path.open("wb") as file:
            for part in obstore.get(self._store, key).stream(min_chunk_size=CHUNK_BYTES):
                pending += part
                whole = len(pending) - len(pending) % CHUNK_BYTES
                done += _checked(index, done, memoryview(pending)[:whole])
                file.write(memoryview(pending)[:whole])
                pending = pending[whole:]
            done += _checked(index, done, memoryview(pending))
            file.write(pending)
        if done != len(index.chunks):
            raise _damaged(index, done)

    def _said(self, key: str) -> AbstractContextManager[None]:
        return _in_words(self.url, key)


def owner_of(section: StoreSection) -> str:
    """The federation whose prefix it is; empty if it is nobody's. Changes nothing.

    Raises:
        ConfigInvalid: There is no such bucket, or it can't be read with these credentials.
        Unavailable: It can't be reached.
    """
    try:
        with _in_words(section.url, OWNER):
            return bytes(obstore.get(_opened(section), OWNER).bytes()).decode()
    except FileNotFoundError:
        return ""


def _opened(section: StoreSection) -> S3Store:
    url = urlsplit(section.url)
    given: dict[str, Any] = _credentials(section.credentials) if section.credentials else {}
    if section.endpoint:
        given["endpoint"] = section.endpoint
    if section.region:
        given["region"] = section.region
    return S3Store(
        url.netloc,
        prefix=url.path.strip("/") or None,
        client_options={
            "allow_http": section.endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=10),
            "timeout": timedelta(seconds=120),
        },
        retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
        **given,
    )


@contextmanager
def _in_words(url: str, key: str) -> Iterator[None]:
    """Errors of the object store in words of ours."""
    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise ConfigInvalid(
            f"{url}: access to {key} was denied. Its credentials ([store] credentials, or"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the daemon) must allow get, put, list"
            f" and delete there. {_first_line(error)}",
            key="store.credentials",
        ) from None
    except AlreadyExistsError:
        raise
    except (FileNotFoundError, BaseError) as error:
        if "NoSuchBucket" in str(error):
            raise ConfigInvalid(
                f"{url}: there is no such bucket. Make it, or correct [store] url, endpoint or region",
                key="store.url",
            ) from None
        if isinstance(error, FileNotFoundError):
            raise
        if " 416 " in _first_line(error):
            raise _Beyond from None
        raise Unavailable(
            f"{url}: the object store does not answer as it should ({key}); what needs it goes on"
            f" when it does. Is it up, and is [store] endpoint right? {_first_line(error)}",
            store=url,
        ) from None


class _Beyond(Exception):
    """The range begins behind the end."""


def _name(key: str) -> str:
    return key.rsplit("/", 1)[-1]


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0][:300]


def _checked(index: Index, first: int, data: memoryview) -> int:
    """Check chunks from a number on; gives how many there are."""
    for at in range(0, len(data), CHUNK_BYTES):
        number = first + at // CHUNK_BYTES
        chunk = data[at : at + CHUNK_BYTES]
        if number >= len(index.chunks) or digest_of(chunk) != index.chunks[number]:
            raise _damaged(index, number)
    return -(-len(data) // CHUNK_BYTES)


def _damaged(index: Index, chunk: int) -> DataCorrupt:
    return DataCorrupt(
        f"artefact {index.digest[:12]}: chunk {chunk} is damaged or missing in the bucket. Restore"
        " the object from a copy, or go back to an earlier round.",
        artefact=index.digest,
        chunk=chunk,
    )


def _credentials(file: str) -> dict[str, Any]:
    """Those of a file like ``~/.aws/credentials``, section ``default``."""
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with Path(file).open() as opened:
            parser.read_file(opened)
        given = parser["default"]
        found = {
            "access_key_id": given["aws_access_key_id"],
            "secret_access_key": given["aws_secret_access_key"],
        }
        if "aws_session_token" in given:
            found["session_token"] = given["aws_session_token"]
    except (OSError, KeyError, configparser.Error) as error:
        raise ConfigInvalid(
            f"[store] credentials: {file} can't be read ({type(error).__name__}). It needs a section"
            " [default] with aws_access_key_id and aws_secret_access_key",
            key="store.credentials",
        ) from None
    return found
