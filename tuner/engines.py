"""Database engines that several processes can share and that survive a server's bad moments."""

from __future__ import annotations

import logging
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy
from optuna.exceptions import StorageInternalError
from sqlalchemy.engine import URL, Connection, Engine
from sqlalchemy.pool import NullPool

from tuner.pools import check_idle
from tuner.urls import parse_url

BUSY_SECONDS = 60
PATIENCE = 600.0
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
READS = "tuner_reads"
SERVER: dict[str, dict[str, Any]] = {
    "postgresql": {
        "connect_timeout": 10,
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
    },
    "mysql": {"connect_timeout": 10, "read_timeout": 60, "write_timeout": 60},
}
SERVER["mariadb"] = SERVER["mysql"]
# A process that is frozen within a transaction holds its locks until the server ends it.
FROZEN_SECONDS = 20
# A machine that is cut off must not keep its connections, and what they lock, for hours.
NOTICE_THE_LOST = (
    "SET tcp_keepalives_idle = 30",
    "SET tcp_keepalives_interval = 10",
    "SET tcp_keepalives_count = 3",
)
# What servers say of transactions that lost a race; they may be run again.
RACES = {"40001", "40P01", "55P03", "57014", "1205", "1213", "1020", "1412", "1317"}
# The server is full, not ready, out of reach or going away.
PASSING = {"57P01", "57P02", "57P03", "08000", "08001", "08003", "08006", "08S01"}
PASSING |= {"53000", "53100", "53200", "53300", "58030", "1040", "1053", "1203", "1226"}
PASSING |= {"2002", "2003"}
SQLITE_PASSING = ("locked", "busy", "disk I/O", "is full")
# psycopg has only words for a connection that was not made.
FINAL = (
    *("authentication failed", "does not exist", "no pg_hba.conf entry", "no password supplied"),
    "invalid port number",
)
BUSY = re.compile(
    "too many|max_user_connections|connection slots|starting up|shutting down|recovery mode"
    "|not yet accepting",
    re.IGNORECASE,
)

T = TypeVar("T")
log = logging.getLogger(__name__)


class UnreachableError(sqlalchemy.exc.SQLAlchemyError):
    """A server between this process and the database did not answer: try again."""


def arguments(url: URL, connections: int = 1) -> dict[str, Any]:
    """What an engine to ``url`` is made with: how it connects, and what it keeps open.

    On a server those are a few ``connections``, given back when idle (``rest``).
    """
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    backend = url.get_backend_name()
    made: dict[str, Any] = {
        "connect_args": SERVER[backend],
        "pool_size": connections,
        "max_overflow": 2,
    }
    if backend != "postgresql":
        made["isolation_level"] = "READ COMMITTED"
    return made


def make_engine(url: str, connections: int = 1) -> Engine:
    """An engine for many short transactions, hardened as Tuner's storages are."""
    parsed = parse_url(url)
    engine = sqlalchemy.create_engine(parsed, **arguments(parsed, connections))
    if parsed.get_backend_name() == "sqlite":
        harden_sqlite(engine)
    else:
        _end_frozen(engine)
        check_idle(engine)
    return engine


def reading(engine: Engine) -> dict[str, Any]:
    """Execution options of a connection that only reads.

    PostgreSQL needs no transaction for that: it halves what a small read costs.
    """
    options: dict[str, Any] = {READS: True}
    if engine.dialect.name == "postgresql":
        options["isolation_level"] = "AUTOCOMMIT"
    return options


def make_single_engine(url: URL) -> Engine:
    """An engine that keeps no connection between uses, and opens no transaction."""
    connect = arguments(url)["connect_args"]
    return sqlalchemy.create_engine(
        url, poolclass=NullPool, connect_args=connect, isolation_level="AUTOCOMMIT"
    )


def _end_frozen(engine: Engine) -> None:
    """Have the server end transactions of processes that stopped in the middle."""
    settings = [f"SET SESSION wait_timeout = {FROZEN_SECONDS}"]
    if engine.dialect.name == "postgresql":
        frozen = f"SET idle_in_transaction_session_timeout = '{FROZEN_SECONDS}s'"
        settings = [frozen, *NOTICE_THE_LOST]

    @sqlalchemy.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        with connection.cursor() as cursor:
            for setting in settings:
                cursor.execute(setting)
        connection.commit()


def harden_sqlite(engine: Engine, mode: str = "IMMEDIATE") -> None:
    """Give SQLite a write-ahead log, and its write lock at the start of every transaction.

    With SQLite's defaults two processes can claim the same waiting trial. A transaction that
    only reads says so with the execution option ``READS`` and does not wait for the lock.
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
        connection.isolation_level = None
        connection.create_function("tuner_uptime", 0, uptime)

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        reads = connection.get_execution_options().get(READS)
        connection.exec_driver_sql(f"BEGIN {'DEFERRED' if reads else mode}")

    engine.dispose()


def uptime() -> float:
    """Seconds since this machine started: what no change of the clock moves.

    Where the system does not say, it is the clock.
    """
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time()


@cache
def boot_id() -> str:
    """What this run of this machine is told apart by from other runs and machines."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def passes(error: BaseException) -> bool:
    """Whether a database error is of the kind that goes away: try again."""
    error = _cause(error)
    if not isinstance(error, sqlalchemy.exc.DBAPIError):
        return isinstance(error, sqlalchemy.exc.TimeoutError | UnreachableError)
    if error.connection_invalidated:
        return True
    original = error.orig
    codes = _codes(original)
    if codes & (RACES | PASSING):
        return True
    if not isinstance(error, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError):
        return False
    if isinstance(original, sqlite3.Error):
        return any(phrase in str(original) for phrase in SQLITE_PASSING)
    return not codes and not any(phrase in str(original) for phrase in FINAL)


def _cause(error: BaseException) -> BaseException:
    """The database's error, where Optuna has wrapped it."""
    return (error.__cause__ if isinstance(error, StorageInternalError) else None) or error


def _codes(original: BaseException | None) -> set[str]:
    """SQLSTATE and number of a driver's error, as far as it has them."""
    number = next(iter(getattr(original, "args", ())), None)
    found = (getattr(original, "sqlstate", None), number if isinstance(number, int) else None)
    return {str(code) for code in found if code}


def is_busy(error: BaseException) -> bool:
    """Whether a server is there, but takes nobody in at this moment."""
    said = str(getattr(_cause(error), "orig", None))
    return passes(error) and BUSY.search(said) is not None


def pauses(patience: float) -> Iterator[float]:
    """Pauses between tries, longer and longer with jitter, until ``patience`` seconds passed."""
    end, pause = time.monotonic() + patience, FIRST_PAUSE
    while time.monotonic() < end:
        yield pause * random.uniform(0.5, 1.5)
        pause = min(2 * pause, LONGEST_PAUSE)


def insist(
    action: Callable[[], T],
    *,
    patience: float = PATIENCE,
    what: str = "storage",
    when: Callable[[BaseException], bool] = passes,
) -> T:
    """The result of ``action``, tried again with jitter while its error is one that passes.

    Raises:
        Exception: What ``action`` raised last, once ``patience`` seconds are over or when
            trying again cannot help.
    """
    waiting, said = pauses(patience), False
    while True:
        try:
            return action()
        except Exception as error:
            pause = next(waiting, None) if when(error) else None
            if pause is None:
                raise
            if pause > 1 and not said:
                said = True
                log.warning("the %s does not answer; trying again", what)
            time.sleep(pause)
