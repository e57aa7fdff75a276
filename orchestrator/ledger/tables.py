"""The tables of the ledger, as the newest migration leaves them (a test compares the two).

Portable: what SQLite and PostgreSQL both do. JSON is text, so that the same bytes come back.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

meta = Table(
    "meta",
    metadata,
    Column("key", String(200), primary_key=True),
    Column("value", Text, nullable=False),
)

sites = Table(
    "sites",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("state", String(20), nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("certificate_expires", Double),
    Column("created", Double, nullable=False),
)

tokens = Table(
    "tokens",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("site", String(63), ForeignKey("sites.name"), nullable=False, index=True),
    Column("created", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Column("used", Double),
    Column("fingerprint", String(64), nullable=False),
    Column("revoked", Double),
)

certificates = Table(
    "certificates",
    metadata,
    Column("fingerprint", String(64), primary_key=True),
    Column("site", String(63), ForeignKey("sites.name"), nullable=False, index=True),
    Column("pem", LargeBinary, nullable=False),
    Column("issued", Double, nullable=False),
    Column("expires", Double, nullable=False),
    Column("revoked", Double),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("config", Text, nullable=False),
    Column("config_digest", String(64), nullable=False),
    Column("rounds", Integer, nullable=False),
    Column("created", Double, nullable=False),
    Column("state", String(20), nullable=False),
    Column("reason", Text, nullable=False),
    Column("started", Double),
    Column("ended", Double),
    Column("parent_run", String(63), ForeignKey("runs.id")),
    Column("parent_round", Integer),
    Column("model", String(64), nullable=False),
    Column("outer_state", String(64), nullable=False),
)

rounds = Table(
    "rounds",
    metadata,
    Column("run", String(63), ForeignKey("runs.id"), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("state", String(20), nullable=False),
    Column("base", String(64), nullable=False),
    Column("draft", Text, nullable=False),
    Column("quorum", Integer, nullable=False),
    Column("deadline_s", Double, nullable=False),
    Column("started", Double, nullable=False),
    Column("closed", Double),
    Column("ended", Double),
    Column("reason", Text, nullable=False),
    Column("closed_set", Text, nullable=False),
    Column("model", String(64), nullable=False),
    Column("outer_state", String(64), nullable=False),
    Column("memos", Text, nullable=False),
    Column("summary", Text, nullable=False),
)

# The two rules that nothing may ever break are the database's own: a round is committed at most
# once, and has at most one attempt under way.
_COMMITTED = text("state = 'committed'")
_UNDER_WAY = text("state IN ('planned', 'closed', 'held')")
Index(
    "uq_rounds_committed",
    rounds.c.run,
    rounds.c.round,
    unique=True,
    sqlite_where=_COMMITTED,
    postgresql_where=_COMMITTED,
)
Index(
    "uq_rounds_under_way",
    rounds.c.run,
    rounds.c.round,
    unique=True,
    sqlite_where=_UNDER_WAY,
    postgresql_where=_UNDER_WAY,
)

exchanges = Table(
    "exchanges",
    metadata,
    Column("run", String(63), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(20), primary_key=True),
    Column("opened", Double, nullable=False),
    Column("closed", Double),
    ForeignKeyConstraint(
        ["run", "round", "attempt"], ["rounds.run", "rounds.round", "rounds.attempt"]
    ),
)

contributions = Table(
    "contributions",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("plan_id", String(256), nullable=False),
    Column("run", String(63), nullable=False),
    Column("round", Integer, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("kind", String(20), nullable=False),
    Column("site", String(63), nullable=False),
    Column("work_digest", String(64), nullable=False),
    Column("header", LargeBinary, nullable=False),
    Column("signature", LargeBinary, nullable=False),
    Column("fingerprint", String(64), nullable=False),
    Column("index", String(64), nullable=False),
    Column("manifest", String(64), nullable=False),
    Column("nbytes", BigInteger, nullable=False),
    Column("norm", Double),
    Column("received", Double, nullable=False),
    Column("verdict", String(20), nullable=False),
    ForeignKeyConstraint(
        ["run", "round", "attempt"], ["rounds.run", "rounds.round", "rounds.attempt"]
    ),
    Index("ix_contributions_work", "run", "round", "kind", "site"),
)

plans = Table(
    "plans",
    metadata,
    Column("run", String(63), primary_key=True),
    Column("round", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(20), primary_key=True),
    Column("site", String(63), primary_key=True),
    Column("plan", LargeBinary, nullable=False),
    Column("work_digest", String(64), nullable=False),
    Column("answer", String(20), nullable=False),
    Column("error", String(200), nullable=False),
    Column("message", Text, nullable=False),
    Column("answered", Double),
    Column("contribution", String(64), ForeignKey("contributions.digest")),
    ForeignKeyConstraint(
        ["run", "round", "attempt", "kind"],
        ["exchanges.run", "exchanges.round", "exchanges.attempt", "exchanges.kind"],
    ),
    Index("ix_plans_site", "site", "answer"),
)

entries = Table(
    "entries",
    metadata,
    Column("run", String(63), ForeignKey("runs.id"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("kind", String(20), nullable=False),
    Column("time", Double, nullable=False),
    Column("document", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
)

signers = Table(
    "signers",
    metadata,
    Column("fingerprint", String(64), primary_key=True),
    Column("pem", LargeBinary, nullable=False),
)

signatures = Table(
    "signatures",
    metadata,
    Column("run", String(63), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("time", Double, nullable=False),
    Column("fingerprint", String(64), ForeignKey("signers.fingerprint"), nullable=False),
    Column("value", LargeBinary, nullable=False),
    ForeignKeyConstraint(["run", "number"], ["entries.run", "entries.number"]),
)
