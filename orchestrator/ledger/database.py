"""The database under the ledger: opening it, migrating it, one writer, errors in our own words."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy import exc

from orchestrator.ledger import tables
from protos.errors import ConfigInvalid, Conflict, DataCorrupt, OutOfSpace, Unavailable
from protos.faults import reach

HEAD = "0002"
"""The newest migration. A ledger that has it is opened without loading alembic (0.3 s)."""

BUSY_S = 5.0
"""How long to wait for another process that writes before giving up."""

MIGRATIONS = Path(__file__).parent / "migrations"

T = TypeVar("T")


class _Work(Generic[T]):
    """What somebody waits to write, and what came of it."""

    def __init__(self, work: Callable[[sa.Connection], T]) -> None:
        self.work = work
        self.result: T | None = None
        self.error: BaseException | None = None
        self.done = False


class Database:
    """An open database; `open` makes one."""

    def __init__(self, engine: sa.Engine, name: str, clock: Callable[[], float]) -> None:
        self._engine, self._name, self._clock = engine, name, clock
        self._reader = engine.execution_options(reading=True)
        self._writer = threading.RLock()
        self._waiting: deque[_Work[Any]] = deque()
        self._run_ids: dict[str, str] = {}  # by name or id, of those that were asked for

    @classmethod
    def open(cls, where: str | Path, clock: Callable[[], float] = time.time) -> Self:
        """Open a ledger, make it if there is none, and bring it to this version.

        Args:
            where: A file, or the URL of a database (``postgresql://…``).
            clock: Gives the seconds since the epoch.

        Raises:
            ConfigInvalid: The driver of that kind of database is not installed.
            Conflict: A newer Farflung wrote it.
            DataCorrupt: It is damaged, or not a database.
            Unavailable: Another process holds it, or the database server can't be reached.
        """
        url = _url(where)
        try:
            engine = _engine(url)
        except ModuleNotFoundError as error:
            raise ConfigInvalid(
                f"ledger: {url.drivername} needs the Python package {error.name}, which is not"
                " installed. Install it, or use a file."
            ) from error
        name = url.database or "" if url.drivername == "sqlite" else url.render_as_string()
        ledger = cls(engine, name, clock)
        try:
            ledger._migrate()
        except BaseException:
            ledger.close()
            raise
        return ledger

    def close(self) -> None:
        """Close it; the object can't be used any more."""
        with self._writer:
            self._engine.dispose()

    def get_meta(self, key: str) -> str | None:
        """What was stored under a key; None if nothing was."""
        with self._reading() as db:
            return db.scalar(sa.select(tables.meta.c.value).where(tables.meta.c.key == key))

    def set_meta(self, key: str, value: str) -> None:
        """Store some text under a key."""
        with self._writing() as db:
            done = db.execute(
                sa.update(tables.meta).where(tables.meta.c.key == key).values(value=value)
            )
            if not done.rowcount:
                db.execute(sa.insert(tables.meta).values(key=key, value=value))

    @contextmanager
    def _writing(self) -> Iterator[sa.Connection]:
        """One transaction that may write: all of it is durable afterwards, or none of it."""
        with self._writer, self._translated(), self._engine.begin() as db:
            reach("ledger.begun")
            yield db
            reach("ledger.written")
        reach("ledger.committed")

    def _written(self, work: Callable[[sa.Connection], T]) -> T:
        """Do some work and make it durable, in one transaction with what others wait to do.

        To sync costs more than to write, and one sync does for all: whoever has the lock works for
        those who came meanwhile. If anything fails, each has a transaction of its own.
        """
        mine = _Work(work)
        self._waiting.append(mine)
        with self._writer:
            if not mine.done:
                batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
                self._write(batch)
        if mine.error is not None:
            raise mine.error
        return mine.result  # type: ignore[return-value]

    def _write(self, batch: Sequence[_Work[Any]]) -> None:
        try:
            with self._writing() as db:
                results = [one.work(db) for one in batch]
        except Exception as error:  # noqa: BLE001 - whoever asked for the work raises it
            if len(batch) > 1:
                for one in batch:
                    self._write([one])
                return
            results, batch[0].error = [None], error
        for one, result in zip(batch, results, strict=True):
            one.result, one.done = result, True

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        """One transaction that sees one state of the ledger, and waits for no writer."""
        with self._translated(), self._reader.begin() as db:
            yield db

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (exc.DatabaseError, sqlite3.DatabaseError) as error:  # the latter: on connecting
            raise _ours(error, self._name) from error

    def _migrate(self) -> None:
        with self._reading() as db:
            current = _revision(db)
        if current == HEAD:
            return
        # Loaded late: only a new ledger, or an older one, needs it.
        from alembic import command
        from alembic.config import Config
        from alembic.script import ScriptDirectory

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        known = {one.revision for one in ScriptDirectory.from_config(config).walk_revisions()}
        with self._writing() as db:
            current = _revision(db)  # another process may have been faster
            if current is not None and current not in known:
                raise Conflict(
                    f"{self._name}: a newer version of Farflung wrote this ledger (its revision is"
                    f" {current}, this version knows up to {HEAD}). Install that version again, or"
                    " restore a backup from before the upgrade.",
                    revision=current,
                    newest=HEAD,
                )
            config.attributes["connection"] = db
            command.upgrade(config, "head")


def to_json(value: Any) -> str:
    """The text that is stored: sorted, and NaN as it is (a loss may be one)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def plain(text: str) -> str:
    """Text that every database takes: PostgreSQL refuses the character of code 0."""
    return text.replace("\0", "")


def _url(where: str | Path) -> sa.URL:
    if isinstance(where, str) and "://" in where:
        url = sa.make_url(where)
        if url.drivername == "postgresql":
            url = url.set(drivername="postgresql+psycopg")
        return url
    return sa.URL.create("sqlite", database=str(Path(where).absolute()))


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() != "sqlite":
        return sa.create_engine(url, pool_pre_ping=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_S, "check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _connected(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # transactions begin where we say, not where it guesses
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begun(connection: sa.Connection) -> None:
        # A writer takes the lock at once: to upgrade a read lock later fails without waiting.
        reading = connection.get_execution_options().get("reading", False)
        connection.connection.driver_connection.execute("BEGIN" if reading else "BEGIN IMMEDIATE")  # type: ignore[union-attr]

    return engine


def _revision(db: sa.Connection) -> str | None:
    if not sa.inspect(db).has_table("alembic_version"):
        return None
    found: str | None = db.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return found


def _ours(error: exc.DatabaseError | sqlite3.DatabaseError, name: str) -> Exception:
    """The same in our words; what can only be a mistake of ours stays what it is."""
    cause = error.orig if isinstance(error, exc.DatabaseError) else error
    text = str(cause).strip()
    low = text.lower()
    if "locked" in low or "busy" in low:
        return Unavailable(
            f"{name}: another process is writing to this ledger and did not finish within"
            f" {BUSY_S:g} s. Only one daemon may use it."
        )
    if "disk is full" in low or "no space left" in low:
        return OutOfSpace(f"{name}: the disk is full. Make room and start again.")
    if "malformed" in low or "not a database" in low:
        return DataCorrupt(
            f"{name}: the ledger is damaged or is not a ledger ({text}). Restore it from a backup."
        )
    if "unable to open" in low or "readonly" in low:
        return Unavailable(
            f"{name}: the ledger can't be opened for writing ({text}). Check that its folder is"
            " there and belongs to this user."
        )
    if isinstance(error, exc.IntegrityError):
        return Conflict(f"{name}: that is there already, or what it refers to is not ({text})")
    if isinstance(error, exc.OperationalError | sqlite3.OperationalError):
        return Unavailable(f"{name}: the database does not answer ({text})")
    return error
