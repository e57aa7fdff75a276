"""Run by alembic for every migration; the connection and its transaction come from the ledger.

There is no alembic.ini: `orchestrator.ledger.database` says what is needed. To write the next one:

    1. change `tables.py`
    2. add ``versions/NNNN_what.py`` with ``down_revision`` naming the newest one
    3. set `HEAD` in `database.py`; the tests compare all three
"""

from alembic import context
from sqlalchemy import Connection

from orchestrator.ledger.tables import metadata

connection: Connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",  # which can't alter columns in place
)
context.run_migrations()
