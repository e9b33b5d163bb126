"""Tuner's own tables: attempts, workers, epochs, controls, beside Optuna's in one database."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.mysql import MEDIUMTEXT

metadata = sa.MetaData()
NAME = sa.String(255)
# Seconds since 1970 by the database's clock, as 8-byte floats.
TIME: sa.Double[float] = sa.Double()
# MySQL's TEXT ends at 64 KiB.
LONG = sa.Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")

attempts = sa.Table(
    "tuner_attempts",
    metadata,
    sa.Column("token", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.Integer, nullable=False),
    sa.Column("trial_id", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    # The trial while the lease is held, else NULL: the database admits one holder per trial.
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
    sa.Column("new_epochs", sa.Integer, nullable=False, default=0),
    sa.Column("seconds", TIME, nullable=False, default=0.0),
    sa.Column("speed", TIME),
    sa.Index("tuner_attempts_study_end", "study_id", "ended_at"),
    sa.Index("tuner_attempts_trial", "trial_id"),
    sqlite_autoincrement=True,
)

workers = sa.Table(
    "tuner_workers",
    metadata,
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

epochs = sa.Table(
    "tuner_epochs",
    metadata,
    sa.Column("trial_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("token", sa.Integer, nullable=False),
    sa.Column("seconds", TIME, nullable=False),
    sa.Column("samples", sa.Integer, nullable=False),
    sa.Column("metrics", LONG, nullable=False),
    sa.Column("recorded_at", TIME, nullable=False),
)

controls = sa.Table(
    "tuner_controls",
    metadata,
    sa.Column("study_id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", NAME, nullable=False),
    sa.Column("reason", NAME),
    sa.Column("detail", LONG),
    sa.Column("changed_at", TIME, nullable=False),
    sa.Column("started_at", TIME),
    # Training seconds of the attempts that ended; those that run are in their own rows.
    sa.Column("spent", TIME, nullable=False, default=0.0),
)

clocks = sa.Table(
    "tuner_clocks",
    metadata,
    sa.Column("boot_id", NAME, primary_key=True),
    sa.Column("zero", TIME, nullable=False),
)
