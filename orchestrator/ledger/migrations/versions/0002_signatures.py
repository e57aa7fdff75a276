"""Signatures of what was committed, and the certificates of whose they are."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "signers",
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("pem", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_signers")),
    )
    op.create_table(
        "signatures",
        sa.Column("run", sa.String(length=63), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("time", sa.Double(), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("value", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["fingerprint"], ["signers.fingerprint"], name=op.f("fk_signatures_fingerprint")
        ),
        sa.ForeignKeyConstraint(
            ["run", "number"], ["entries.run", "entries.number"], name=op.f("fk_signatures_run")
        ),
        sa.PrimaryKeyConstraint("run", "number", name=op.f("pk_signatures")),
    )
