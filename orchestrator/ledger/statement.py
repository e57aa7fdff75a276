"""Statements that every round runs many times: SQLAlchemy writes them, once, and the driver runs them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.sql.compiler import SQLCompiler

Values = Mapping[str, Any]


class _Text(NamedTuple):
    """A statement in one database's words.

    Attributes:
        sql: The text.
        fixed: Values that are part of the statement.
        order: Names of the values, where the driver takes them by position.
        row: Makes a row of a tuple.
    """

    sql: str
    fixed: dict[str, Any]
    order: Sequence[str] | None
    row: Any


class Statement:
    """A statement whose words never change, only its values.

    It is part of the connection's transaction. `sqlalchemy.Connection.execute` looks up, copies and wraps for
    each call, which takes some ten times as long as SQLite takes to answer (54 us and 4).

    Args:
        query: What to run; its parameters are named by `sqlalchemy.bindparam`, those of an insert by the
            columns of its table. No list in it: IN has other words for each length.
    """

    def __init__(self, query: sa.ClauseElement) -> None:
        self._query = query
        self._texts: dict[str, _Text] = {}

    def all(self, db: sa.Connection, values: Values) -> list[Any]:
        """The rows, as named tuples."""
        text = self._text(db)
        return [text.row(*row) for row in self._run(db, text, values).fetchall()]

    def first(self, db: sa.Connection, values: Values) -> Any:
        """The first row; None if there is none."""
        text = self._text(db)
        row = self._run(db, text, values).fetchone()
        return None if row is None else text.row(*row)

    def change(self, db: sa.Connection, values: Values) -> int:
        """Run a statement that writes; gives the number of rows that it changed."""
        return int(self._run(db, self._text(db), values).rowcount)

    def _run(self, db: sa.Connection, text: _Text, values: Values) -> Any:
        given: Any = {**text.fixed, **values}
        if text.order is not None:
            given = [given[name] for name in text.order]
        errors = db.dialect.loaded_dbapi.Error
        try:
            return db.connection.driver_connection.execute(text.sql, given)  # type: ignore[union-attr]
        except errors as error:
            raise exc.DBAPIError.instance(
                text.sql, given, error, errors, dialect=db.dialect
            ) from error

    def _text(self, db: sa.Connection) -> _Text:
        known = self._texts.get(db.dialect.name)
        if known is None:
            made = cast(SQLCompiler, self._query.compile(dialect=db.dialect))
            fixed = [one for one in made.binds.values() if not one.required]
            columns = [column.key for column in getattr(self._query, "selected_columns", ())]
            known = self._texts[db.dialect.name] = _Text(
                str(made),
                {made.bind_names[one]: one.effective_value for one in fixed},
                made.positiontup,
                namedtuple("Row", columns),
            )
        return known
