"""Storages that several processes can share, and that keep their passwords to themselves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage

from tuner.errors import StorageError
from tuner.storage import DEFAULT_URL, exclusive, masked, open_storage, storage_url

PASSWORD = "s3cret{x}%40"


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
        ("oracle://host/name", "oracle"),
    ],
)
def test_storage_that_cannot_be_is_refused_with_the_way_out(url: str, said: str) -> None:
    with pytest.raises(StorageError, match=said):
        open_storage(url)


def test_password_is_in_no_message() -> None:
    url = f"postgresql+psycopg://someone:{PASSWORD}@127.0.0.1:1/nothing"
    assert "s3cret" not in masked(url)
    with pytest.raises(StorageError) as caught:
        open_storage(url)
    assert "s3cret" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert "someone" in str(caught.value)


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


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.database)])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_exclusive_lets_one_in_at_a_time(url: str) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def enter() -> None:
        nonlocal inside, most
        with exclusive(url):
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


def test_lock_of_a_killed_process_is_free(url: str) -> None:
    code = "import sys, time; from tuner.storage import exclusive\n"
    code += f"with exclusive({url!r}): print('in', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"in\n"
    os.kill(holder.pid, 9)
    holder.wait()
    with exclusive(url):
        pass


@pytest.mark.database
def test_dropped_connections_are_survived(postgres: str) -> None:
    study = optuna.create_study(storage=open_storage(postgres), study_name="s")
    server = sqlalchemy.create_engine(postgres, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    study.enqueue_trial({})
    assert len(study.trials) == 1


@pytest.mark.database
def test_idle_worker_holds_no_connection(postgres: str) -> None:
    study = optuna.create_study(storage=open_storage(postgres), study_name="s")
    study.enqueue_trial({})
    server = sqlalchemy.create_engine(postgres)
    with server.connect() as connection:
        count = connection.exec_driver_sql(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        ).scalar()
    assert count == 0
