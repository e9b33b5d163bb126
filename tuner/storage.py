"""Hardened Optuna storages: SQLite that several processes can share, PostgreSQL that survives."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import URL, make_url
from sqlalchemy.pool import NullPool

from tuner.errors import StorageError

DEFAULT_URL = "sqlite:///runs/tuner.db"
BUSY_SECONDS = 60

log = logging.getLogger(__name__)


def storage_url(given: str | None) -> str:
    """The storage to use: as given, else ``TUNER_STORAGE``, ``OPTUNA_STORAGE``, else a file."""
    return (
        given or os.environ.get("TUNER_STORAGE") or os.environ.get("OPTUNA_STORAGE") or DEFAULT_URL
    )


def masked(url: str) -> str:
    """``url`` without its password, fit for messages and logs."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return "(a storage URL that cannot be parsed)"


def open_storage(url: str, *, create: bool = True, writes: bool = True) -> BaseStorage:
    """Open the storage at ``url``, with Optuna's cache in front.

    SQLite gets a write-ahead log and takes its write lock at the start of every transaction:
    with Optuna's defaults, two processes can claim the same waiting trial. Who only reads says
    ``writes=False`` and does not get in the way of those who write. Other databases get
    a connection per transaction that is checked before use, so that idle workers hold none.

    Raises:
        StorageError: The URL is no database URL, or the database cannot be reached or made;
            no message holds the password.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        _prepare_file(parsed, create)
    try:
        with exclusive(url):
            storage = _rdb_storage(parsed, writes)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, OSError, RuntimeError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise StorageError(
            f"cannot open the storage {masked(url)}: {_without_password(reason, parsed)}"
        ) from None
    return optuna.storages.get_storage(storage)


def _parse(url: str) -> URL:
    try:
        return make_url(url)
    except sqlalchemy.exc.ArgumentError:
        raise StorageError(
            "the storage is no database URL; give sqlite:///FILE.db or "
            "postgresql+psycopg://USER@HOST/DATABASE with --storage or TUNER_STORAGE"
        ) from None


def _prepare_file(url: URL, create: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise StorageError("a study needs a file: give sqlite:///FILE.db, not an in-memory SQLite")
    path = Path(url.database)
    if not create and not path.exists():
        raise StorageError(
            f"{path}: no such storage; run a study first, or name another with --storage"
        )
    path.parent.mkdir(parents=True, exist_ok=True)


def _rdb_storage(url: URL, writes: bool) -> RDBStorage:
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if url.get_backend_name() == "sqlite":
            arguments: dict[str, Any] = {"connect_args": {"timeout": BUSY_SECONDS}}
            storage = RDBStorage(text, engine_kwargs=arguments)
            _harden_sqlite(storage.engine, "IMMEDIATE" if writes else "DEFERRED")
            return storage
        arguments = {"poolclass": NullPool, "pool_pre_ping": True}
        return RDBStorage(text, engine_kwargs=arguments)


def _harden_sqlite(engine: sqlalchemy.Engine, mode: str) -> None:
    @sqlalchemy.event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {mode}")

    engine.dispose()


@contextlib.contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Hold a lock on the storage at ``url`` that only one process has at a time.

    For what must happen once however many workers start together: making the tables, creating
    a study, filling its queue. SQLite: a lock file beside the database; PostgreSQL and MySQL:
    an advisory lock, freed by the server when the process dies.
    """
    parsed = _parse(url)
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        with _file_lock(Path(f"{parsed.database}.lock")):
            yield
        return
    queries = {
        "postgresql": "SELECT pg_advisory_lock(7483647)",
        "mysql": "SELECT GET_LOCK('tuner', 60)",
        "mariadb": "SELECT GET_LOCK('tuner', 60)",
    }
    if backend not in queries:
        raise StorageError(f"{backend} is no storage Tuner knows; use SQLite, PostgreSQL or MySQL")
    engine = sqlalchemy.create_engine(parsed, poolclass=NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql(queries[backend])
        yield


@contextlib.contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _without_password(text: str, url: URL) -> str:
    return text.replace(str(url.password), "***") if url.password else text
