"""The clock that decides leases: the database's, never a worker's."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from tuner.engines import boot_id, uptime
from tuner.ledger._tables import clocks, workers


def now(connection: Connection) -> sa.ColumnElement[Any]:
    """Seconds since 1970 as an SQL expression, by a clock all workers share.

    SQLite has no server. Its workers are on one machine, so they count from the moment it
    started: a clock that is set forward by an hour must not end everybody's lease.
    """
    return by_dialect(connection.dialect.name)


@cache
def by_dialect(dialect: str) -> sa.ColumnElement[Any]:
    """The expression of ``now`` for a kind of database."""
    clock: sa.ColumnElement[Any]
    if dialect == "postgresql":
        clock = sa.func.date_part("epoch", sa.func.clock_timestamp())
    elif dialect == "sqlite":
        zero = sa.select(clocks.c.zero).where(clocks.c.boot_id == boot_id()).scalar_subquery()
        # Who only reads may come before anybody noted this start of the machine.
        clock = sa.func.tuner_uptime() + sa.func.coalesce(zero, time.time() - uptime())
    else:
        # Not of NOW(): in autumn a server's local time says the same hour twice.
        micros = "TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6))"
        clock = sa.literal_column(f"{micros} / 1e6", sa.Double())
    return sa.type_coerce(clock, sa.Double())


def read_now(connection: Connection) -> float:
    """The time by the shared clock, in seconds since 1970."""
    return float(connection.execute(sa.select(now(connection))).scalar_one())


def has_zero(connection: Connection) -> bool:
    """Whether it is known when this machine started; servers need not know."""
    known = sa.select(clocks.c.zero).where(clocks.c.boot_id == boot_id())
    return connection.dialect.name != "sqlite" or connection.execute(known).first() is not None


def set_zero(connection: Connection) -> None:
    """Note, once per start of the machine, when it started: SQLite's clock counts from there."""
    if not has_zero(connection):
        # A clock that was set back while the machine was off must not make leases last.
        last = connection.execute(sa.select(sa.func.max(workers.c.heartbeat_at))).scalar()
        zero = max(time.time(), last or 0.0) - uptime()
        connection.execute(sa.insert(clocks).values(boot_id=boot_id(), zero=zero))
