"""Statements that the database's driver runs: of the transaction, with SQLAlchemy's errors."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import exc

from orchestrator.ledger.statement import Statement

TABLE = sa.Table(
    "pieces",
    sa.MetaData(),
    sa.Column("index", sa.Integer, primary_key=True),
    sa.Column("text", sa.Text),
    sa.Column("data", sa.LargeBinary),
)
INSERT = Statement(sa.insert(TABLE))
FIND = Statement(
    sa.select(TABLE).where(TABLE.c.index >= sa.bindparam("the_index")).order_by(TABLE.c.index)
)
CLEAR = Statement(
    sa.update(TABLE).where(TABLE.c.index == sa.bindparam("the_index")).values(text=None, data=b"no")
)


@pytest.fixture
def engine(tmp_path: Path) -> sa.Engine:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'it.sqlite'}")
    TABLE.metadata.create_all(engine)
    return engine


def put(db: sa.Connection, index: int, text: str = "a", data: bytes = b"") -> None:
    assert INSERT.change(db, {"index": index, "text": text, "data": data}) == 1


def test_rows_have_the_names_of_their_columns(engine: sa.Engine) -> None:
    with engine.begin() as db:
        put(db, 1, "one", b"\0\xff")
        put(db, 2, "two")
        assert [(r.index, r.text) for r in FIND.all(db, {"the_index": 0})] == [
            (1, "one"),
            (2, "two"),
        ]
        assert FIND.first(db, {"the_index": 1}).data == b"\0\xff"
        assert FIND.first(db, {"the_index": 3}) is None


def test_it_is_part_of_the_transaction(engine: sa.Engine) -> None:
    with engine.connect() as db:
        put(db, 1)
        assert db.scalar(sa.select(sa.func.count()).select_from(TABLE)) == 1
        db.rollback()
    with engine.begin() as db:
        assert FIND.all(db, {"the_index": 0}) == []


def test_what_stands_in_it_is_kept(engine: sa.Engine) -> None:
    with engine.begin() as db:
        put(db, 1, "one", b"yes")
        assert CLEAR.change(db, {"the_index": 2}) == 0
        assert CLEAR.change(db, {"the_index": 1}) == 1
        row = FIND.first(db, {"the_index": 1})
    assert (row.text, row.data) == (None, b"no")


def test_a_value_that_is_forgotten_is_no_null(engine: sa.Engine) -> None:
    with engine.begin() as db, pytest.raises(KeyError, match="data"):
        INSERT.change(db, {"index": 1, "text": "a"})


def test_the_errors_are_those_of_the_library(engine: sa.Engine) -> None:
    with engine.begin() as db:
        put(db, 1)
        with pytest.raises(exc.IntegrityError, match="UNIQUE"):
            put(db, 1)
