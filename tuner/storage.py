"""Hardened Optuna storages: SQLite that several processes can share, PostgreSQL that survives."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import OptunaError, StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import NullPool

from tuner.engines import (
    NOTICE_THE_LOST,
    SERVER,
    arguments,
    harden_sqlite,
    insist,
    is_busy,
    make_single_engine,
    passes,
)
from tuner.errors import StorageError, TunerError
from tuner.remote import is_host, is_remote, open_remote
from tuner.urls import masked, parse_url, without_password

DEFAULT_URL = "sqlite:///runs/tuner.db"
VERSION_TABLE = "alembic_version"
LOCK_SECONDS = 300
LOCK_PAUSE = 0.02
LOCKED = "{} stays locked by another process, which may hang while it opens it; try again"
LOCK_TRIES = 20
CAUSES = (sqlalchemy.exc.SQLAlchemyError, OptunaError)


def storage_url(given: str | None) -> str:
    """The storage to use: as given, else ``TUNER_STORAGE``, ``OPTUNA_STORAGE``, else a file."""
    return (
        given or os.environ.get("TUNER_STORAGE") or os.environ.get("OPTUNA_STORAGE") or DEFAULT_URL
    )


def lease_seconds() -> float:
    """How long a worker may be silent before its trial is another's: ``TUNER_LEASE``, else 60.

    Raises:
        TunerError: ``TUNER_LEASE`` is no number of at least one second.
    """
    given = os.environ.get("TUNER_LEASE", "60")
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 86_400:
        raise TunerError(f"TUNER_LEASE = {given!r}: must be seconds, at least 1; 60 is usual")
    return seconds


def open_storage(url: str, *, create: bool = True, writes: bool = True) -> BaseStorage:
    """Open the storage at ``url``, with Optuna's cache in front.

    SQLite gets a write-ahead log and takes its write lock at the start of every transaction:
    with Optuna's defaults, two processes can claim the same waiting trial. Who only reads says
    ``writes=False`` and does not get in the way of those who write. Other databases get
    a connection per transaction, so that idle workers hold none.
    ``grpc://HOST:PORT`` is the storage behind a proxy.

    Raises:
        StorageError: The URL is no database URL, or the database cannot be reached or made;
            no message holds the password.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if is_remote(url):
        return open_remote(url)
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        _prepare_file(parsed, create)
    with opening(url):
        made = insist(lambda: _has_tables(parsed), patience=LOCK_SECONDS, when=is_busy)
        # Only who makes the tables must be alone.
        with contextlib.nullcontext() if made else exclusive(url):
            storage = insist(
                lambda: _rdb_storage(parsed, writes, make=not made),
                patience=LOCK_SECONDS,
                when=is_busy,
            )
    return optuna.storages.get_storage(storage)


@contextlib.contextmanager
def opening(url: str) -> Iterator[None]:
    """Turn what goes wrong inside into one message without the password.

    Raises:
        StorageError: Anything the database, its driver or the system said.
    """
    try:
        yield
    except (
        sqlalchemy.exc.SQLAlchemyError,
        OptunaError,
        ImportError,
        OSError,
        RuntimeError,
    ) as error:
        reason, parsed = _reason(error, url), parse_url(url)
        if isinstance(error, ImportError) and parsed.get_backend_name() in ("mysql", "mariadb"):
            reason += "; pip install 'tuner[mysql]'"
        # A running worker's name server may forget a host for a while; here it is a wrong one.
        away = passes(error) and (not parsed.host or is_host(parsed.host))
        raise StorageError(
            f"cannot open the storage {masked(url)}: {reason}", passes=away
        ) from None


def failure(error: Exception, url: str) -> StorageError | None:
    """What the database at ``url`` said after it was opened, as one message; None: it is no such.

    The message does not hold the password.
    """
    if isinstance(error, StorageError):
        return error
    if not isinstance(error, sqlalchemy.exc.SQLAlchemyError | StorageInternalError):
        return None
    away = passes(error)
    said = "does not answer" if away else "refused"
    then = "; try again when it is back, or see tuner doctor" if away else " (--debug shows where)"
    text = f"the storage {masked(url)} {said}: {_reason(error, url)}{then}"
    return StorageError(text, passes=away)


def _reason(error: BaseException, url: str) -> str:
    """The first line of what a database, its driver or the system said, without the password."""
    cause = error.__cause__ if isinstance(error, OptunaError) else error
    said = str(getattr(cause, "orig", None) or cause or error).strip().splitlines()
    reason = said[0] if said else type(error).__name__
    return reason if is_remote(url) else without_password(reason, parse_url(url))


def _prepare_file(url: URL, create: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise StorageError("a study needs a file: give sqlite:///FILE.db, not an in-memory SQLite")
    path = Path(url.database)
    if not create and not path.exists():
        raise StorageError(
            f"{path}: no such storage; run a study first, or name another with --storage"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"{path.parent}: the storage's folder cannot be made ({error.strerror}); "
            "name another place with --storage or TUNER_STORAGE"
        ) from None


class _Storage(RDBStorage):
    """Optuna's storage, but it does not go into a pickle with its password."""

    def __reduce__(self) -> Any:
        raise TypeError("a storage is not pickled: it holds a password; open it anew")


def _has_tables(url: URL) -> bool:
    """Whether Optuna's tables are there, of whatever version; it says itself if it is another.

    The version is the last thing that Optuna writes when it makes them.
    """
    with make_single_engine(url).connect() as connection:
        if not sqlalchemy.inspect(connection).has_table(VERSION_TABLE):
            return False
        version = sqlalchemy.text(f"SELECT version_num FROM {VERSION_TABLE}")
        return connection.execute(version).first() is not None


def _rdb_storage(url: URL, writes: bool, make: bool) -> RDBStorage:
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    made = arguments(url)
    sqlite = url.get_backend_name() == "sqlite"
    if not sqlite:
        made = {k: v for k, v in made.items() if k not in ("pool_size", "max_overflow")}
        made["poolclass"] = NullPool
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = _Storage(text, engine_kwargs=made, skip_table_creation=not make)
    if sqlite:
        harden_sqlite(storage.engine, "IMMEDIATE" if writes else "DEFERRED")
    return storage


@contextlib.contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Hold a lock on the storage at ``url`` that only one process has at a time.

    For what must happen once however many workers start together: making the tables, creating
    a study, filling its queue. SQLite: a lock file beside the database; PostgreSQL and MySQL:
    an advisory lock, freed by the server when the process dies.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() == "sqlite":
        with _file_lock(Path(f"{parsed.database}.lock")):
            yield
        return
    engine = make_single_engine(parsed)
    with insist(engine.connect, patience=LOCK_SECONDS, when=is_busy) as connection:
        _lock(connection, parsed)
        yield


def _lock(connection: Connection, url: URL) -> None:
    """Take the advisory lock of a database; it is free again once the connection is closed."""
    if url.get_backend_name() == "postgresql":
        connection.exec_driver_sql(f"SET lock_timeout = '{LOCK_SECONDS}s'")
        for setting in NOTICE_THE_LOST:
            connection.exec_driver_sql(setting)
        try:
            connection.exec_driver_sql("SELECT pg_advisory_lock(7483647)")
        except sqlalchemy.exc.OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != "55P03":
                raise
            raise StorageError(LOCKED.format(masked(str(url)))) from None
        return
    # MySQL's locks are the server's, not the database's.
    name = {"name": f"tuner {url.database}"[:64]}
    for _ in range(LOCK_TRIES):
        # Longer than this, and the driver takes the server for dead.
        lock = sqlalchemy.text(f"SELECT GET_LOCK(:name, {SERVER['mysql']['read_timeout'] // 2})")
        if connection.execute(lock, name).scalar() == 1:
            return
    raise StorageError(LOCKED.format(masked(str(url))))


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + LOCK_SECONDS
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise StorageError(LOCKED.format(path)) from None
            time.sleep(LOCK_PAUSE)
        yield
