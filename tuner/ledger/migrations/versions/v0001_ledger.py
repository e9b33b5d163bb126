"""Attempts, workers, epochs, controls and the clock of SQLite."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import MEDIUMTEXT

revision = "0001"
down_revision = None

NAME = sa.String(255)
TIME: sa.Double[float] = sa.Double()
LONG = sa.Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")


def _create(name: str, *columns: sa.schema.SchemaItem, **options: bool) -> None:
    """Make a table, unless it is there: MySQL keeps what an interrupted migration made."""
    if not sa.inspect(op.get_bind()).has_table(name):
        op.create_table(name, *columns, **options)


def upgrade() -> None:
    """Make the tables."""
    _create(
        "tuner_attempts",
        sa.Column("token", sa.Integer, primary_key=True),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("trial_id", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("holds", sa.Integer, unique=True),
        sa.Column("worker_id", NAME, nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("claimed_at", TIME, nullable=False),
        sa.Column("heartbeat_at", TIME, nullable=False),
        sa.Column("lease_until", TIME, nullable=False),
        sa.Column("ended_at", TIME),
        sa.Column("end", NAME),
        sa.Column("reason", NAME),
        sa.Column("detail", LONG),
        sa.Column("note", LONG),
        sa.Column("first_epoch", sa.Integer),
        sa.Column("epoch", sa.Integer),
        sa.Column("new_epochs", sa.Integer, nullable=False, server_default="0"),
        sa.Column("seconds", TIME, nullable=False, server_default="0"),
        sa.Column("speed", TIME),
        sa.Index("tuner_attempts_study_end", "study_id", "ended_at"),
        sa.Index("tuner_attempts_trial", "trial_id"),
        sqlite_autoincrement=True,
    )
    _create(
        "tuner_workers",
        sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("worker_id", NAME, primary_key=True),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("machine", NAME, nullable=False),
        sa.Column("host", NAME, nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("process", NAME, nullable=False),
        sa.Column("device", NAME, nullable=False),
        sa.Column("state", NAME, nullable=False),
        sa.Column("since", TIME, nullable=False),
        sa.Column("heartbeat_at", TIME, nullable=False),
        sa.Column("lease_until", TIME, nullable=False),
        sa.Column("facts", LONG),
    )
    _create(
        "tuner_epochs",
        sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("seconds", TIME, nullable=False),
        sa.Column("samples", sa.Integer, nullable=False),
        sa.Column("metrics", LONG, nullable=False),
        sa.Column("recorded_at", TIME, nullable=False),
    )
    _create(
        "tuner_controls",
        sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("state", NAME, nullable=False),
        sa.Column("reason", NAME),
        sa.Column("detail", LONG),
        sa.Column("changed_at", TIME, nullable=False),
        sa.Column("started_at", TIME),
        sa.Column("spent", TIME, nullable=False, server_default="0"),
    )
    _create(
        "tuner_clocks",
        sa.Column("boot_id", NAME, primary_key=True),
        sa.Column("zero", TIME, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables; what they held is lost."""
    for name in ("clocks", "controls", "epochs", "workers", "attempts"):
        op.drop_table(f"tuner_{name}")
