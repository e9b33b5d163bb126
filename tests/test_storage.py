"""Storages that several processes can share, and that keep their passwords to themselves."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from conftest import new_mariadb
from ledgers import KILL, end_connections
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.engine import make_url

from tuner import engines
from tuner.engines import make_engine
from tuner.errors import StorageError
from tuner.storage import DEFAULT_URL, exclusive, open_storage, storage_url


def engine_of(storage: BaseStorage) -> sqlalchemy.Engine:
    backend = storage._backend  # type: ignore[attr-defined]
    assert isinstance(backend, RDBStorage)
    return backend.engine


def test_sqlite_uses_a_write_ahead_log_and_waits_for_locks(sqlite: str) -> None:
    with engine_of(open_storage(sqlite)).connect() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 60_000}


@pytest.mark.parametrize("made_by", [make_engine, lambda url: engine_of(open_storage(url))])
def test_sqlite_takes_its_write_lock_at_the_start_of_a_transaction(
    made_by: Callable[[str], sqlalchemy.Engine], sqlite: str
) -> None:
    open_storage(sqlite)
    other = sqlite3.connect(make_url(sqlite).database or "", timeout=0, isolation_level=None)
    with made_by(sqlite).begin(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_missing_folder_of_a_sqlite_file_is_made(tmp_path: Path) -> None:
    open_storage(f"sqlite:///{tmp_path}/deep/folder/tuner.db")
    assert (tmp_path / "deep/folder/tuner.db").exists()


def test_reader_does_not_wait_for_a_writer(sqlite: str) -> None:
    optuna.create_study(storage=open_storage(sqlite), study_name="s")
    writer = engine_of(open_storage(sqlite))
    reader = open_storage(sqlite, writes=False)
    with writer.begin() as connection:
        connection.exec_driver_sql("UPDATE studies SET study_name = 's'")
        assert optuna.get_all_study_names(reader) == ["s"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nonsense", "no database URL"),
        ("sqlite://", "give sqlite:///FILE.db"),
        ("sqlite://runs/tuner.db", "three slashes: sqlite:///runs/tuner.db"),
        ("oracle://host/name", "oracle"),
        ("postgres://me@host/name", r"postgres is no .* postgresql\+psycopg://USER@HOST/DATABASE"),
    ],
)
def test_storage_that_cannot_be_is_refused_with_the_way_out(url: str, said: str) -> None:
    with pytest.raises(StorageError, match=said):
        open_storage(url)


def test_url_comes_from_the_option_then_tuner_then_optuna_then_a_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TUNER_STORAGE", raising=False)
    monkeypatch.delenv("OPTUNA_STORAGE", raising=False)
    assert storage_url(None) == DEFAULT_URL
    monkeypatch.setenv("OPTUNA_STORAGE", "sqlite:///optuna.db")
    assert storage_url(None) == "sqlite:///optuna.db"
    monkeypatch.setenv("TUNER_STORAGE", "sqlite:///tuner.db")
    assert storage_url(None) == "sqlite:///tuner.db"
    assert storage_url("sqlite:///given.db") == "sqlite:///given.db"


def test_exclusive_lets_one_in_at_a_time(database: str) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with exclusive(database):
            with guard:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.03)
            with guard:
                inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_lock_of_a_killed_process_is_free(database: str) -> None:
    code = "import sys, time; from tuner.storage import exclusive\n"
    code += f"with exclusive({database!r}): print('in', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"in\n"
    os.kill(holder.pid, 9)
    holder.wait()
    with exclusive(database):
        pass


def test_locks_of_two_databases_do_not_meet(mariadb: str) -> None:
    with new_mariadb() as other, exclusive(mariadb), exclusive(other):
        pass


def test_a_lock_may_be_held_longer_than_a_question_to_the_server_may_take(
    mariadb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engines.SERVER["mysql"], "read_timeout", 2)
    with ThreadPoolExecutor() as pool:
        with exclusive(mariadb):
            waiting = pool.submit(lambda: exclusive(mariadb).__enter__())
            time.sleep(2.5)
            assert not waiting.done()
        waiting.result(timeout=30)


SERVERS_ONLY = pytest.mark.parametrize("server", ["postgres", "mariadb"])


@pytest.mark.database
@SERVERS_ONLY
def test_dropped_connections_are_survived(server: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(server)
    study = optuna.create_study(storage=open_storage(url), study_name="s")
    end_connections(url)
    study.enqueue_trial({})
    assert len(study.trials) == 1


@pytest.mark.database
@SERVERS_ONLY
def test_idle_storage_holds_no_connection(server: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(server)
    study = optuna.create_study(storage=open_storage(url), study_name="s")
    study.enqueue_trial({})
    engine = sqlalchemy.create_engine(url)
    deadline = time.monotonic() + 60
    with engine.connect() as connection:
        others = KILL[engine.dialect.name]
        while connection.exec_driver_sql(others).scalars().all():
            # The server needs a moment to notice that they are gone.
            assert time.monotonic() < deadline
            time.sleep(0.05)
            connection.rollback()
    engine.dispose()


# How libpq finds a server and a password


@pytest.mark.database
def test_a_service_file_says_where_the_server_is(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_url(postgres)
    (tmp_path / "services").write_text(
        f"[fleet]\nhost={place.host}\nport={place.port or 5432}\nuser={place.username}\n"
        f"dbname={place.database}\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGSERVICE", "fleet")
    url = "postgresql+psycopg://"
    optuna.create_study(storage=open_storage(url), study_name="by service")
    with exclusive(url), make_engine(url).connect() as connection:
        found = connection.exec_driver_sql("SELECT current_database()").scalar()
    assert found == place.database
    assert optuna.get_all_study_names(open_storage(postgres)) == ["by service"]


@pytest.mark.database
def test_a_password_file_says_the_password(
    postgres: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "passwords").write_text("*:*:*:*:from-the-file\n")
    (tmp_path / "passwords").chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "passwords"))
    monkeypatch.delenv("PGPASSWORD", raising=False)
    engines_used = [make_engine(postgres), engine_of(open_storage(postgres))]
    for engine in engines_used:
        with engine.connect() as connection:
            raw: Any = connection.connection.dbapi_connection
            # The server here asks for none; libpq had this one ready.
            assert raw.info.password == "from-the-file"


# Servers that are full


def postgres_user(url: str, name: str) -> tuple[list[str], list[str]]:
    """Statements that make and drop a user with as many connections as opening takes."""
    make = f"CREATE ROLE {name} LOGIN CONNECTION LIMIT 3", f"GRANT ALL ON SCHEMA public TO {name}"
    return list(make), [f"DROP OWNED BY {name}", f"DROP ROLE {name}"]


def mariadb_user(url: str, name: str) -> tuple[list[str], list[str]]:
    """The same for MariaDB."""
    # As the server sees it, an address has a name or has none.
    users = [f"{name}@'{host}'" for host in ("localhost", "127.0.0.1")]
    make = [f"CREATE USER {user} WITH MAX_USER_CONNECTIONS 3" for user in users]
    make += [f"GRANT ALL ON {make_url(url).database}.* TO {user}" for user in users]
    return make, [f"DROP USER {user}" for user in users]


@pytest.fixture(params=["postgres", "mariadb"])
def limited(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of an empty database, for a user that gets no more connections than opening takes."""
    url, name = request.getfixturevalue(request.param), f"tuner_{os.urandom(4).hex()}"
    make, drop = {"postgres": postgres_user, "mariadb": mariadb_user}[request.param](url, name)
    root = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with root.connect() as connection:
        for statement in make:
            connection.exec_driver_sql(statement)
    yield make_url(url).set(username=name, password=None).render_as_string(False)
    with root.connect() as connection:
        for statement in drop:
            connection.exec_driver_sql(statement)
    root.dispose()


@pytest.mark.database
def test_a_full_server_is_waited_for(limited: str) -> None:
    engine = make_engine(limited)
    with ThreadPoolExecutor() as pool:
        with engine.connect(), engine.connect(), engine.connect():
            opened = pool.submit(open_storage, limited)
            time.sleep(0.5)
            assert not opened.done()
        engine.dispose()
        opened.result(timeout=30)
