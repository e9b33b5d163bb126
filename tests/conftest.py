"""What many tests need: one thread, a tiny study, and the services that may be there."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch
from alembic.config import Config
from alembic.script import ScriptDirectory
from ledgers import Ledgers, make_tables

from tuner import session as sessions
from tuner.datasets import DATASETS, Data
from tuner.session import Session
from tuner.stores import FolderStore
from tuner.study import StudyFile, parse

POSTGRES = os.environ.get(
    "TUNER_TEST_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
)
MARIADB = os.environ.get("TUNER_TEST_MARIADB", "mariadb+pymysql://root@127.0.0.1:3306/test")
SERVERS = [
    "sqlite",
    pytest.param("postgres", marks=pytest.mark.database),
    pytest.param("mariadb", marks=pytest.mark.database),
]
REQUIRED = os.environ.get("TUNER_REQUIRE_SERVICES") == "1"

# Files whose tests start many processes and wait for them: begun first, they do not end last, with
# one of two cores idle beside them.
LONG = ("test_launch_ray", "chaos", "test_supervisor", "test_worker", "test_launch_slurm")

MakeFile = Callable[..., StudyFile]
MakeSession = Callable[..., Session]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take long first; what order tests have within a file stays."""

    def rank(item: pytest.Item) -> int:
        names = (item.path.stem, item.path.parent.name)
        return min(LONG.index(name) if name in LONG else len(LONG) for name in names)

    items.sort(key=rank)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Features of backbones and what the speed probe finds are kept where the tests end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _migrations_read_once() -> Iterator[None]:
    """Alembic compiles all of Optuna's migrations whenever a storage is opened; once is enough."""
    read, scripts = ScriptDirectory.from_config, dict[str | None, ScriptDirectory]()

    def once(config: Config) -> ScriptDirectory:
        where = config.get_main_option("script_location")
        return scripts.get(where) or scripts.setdefault(where, read(config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", once)
        yield


@pytest.fixture(scope="session")
def digits() -> Data:
    """The bundled digits with a long tail, as in the shipped study."""
    values = {"profile": {"name": "exponential", "ratio": 10}}
    fractions = {"validation_fraction": 0.4, "test_fraction": 0.3}
    return DATASETS.parse("digits", values | fractions, where="digits").build()


@pytest.fixture
def make_file() -> MakeFile:
    """Makes study files over the digits; sections given by keyword replace the defaults."""

    def make(**sections: Any) -> StudyFile:
        import tomli_w

        values: dict[str, Any] = {
            "name": "tiny",
            "data": {
                "name": "digits",
                "profile": {"name": "exponential", "ratio": 10},
                "validation_fraction": 0.4,
                "test_fraction": 0.3,
            },
            "budget": {"trials": 4, "epochs": 3},
            "model": {"name": "linear"},
            "training": {"batch_size": 64},
            "space": {
                "optimizer": {"sgd": {"lr": {"low": 0.05, "high": 0.5, "log": True}}},
                "loss": {"cross_entropy": {}, "balanced_softmax": {}},
            },
        }
        values |= sections
        values = {key: value for key, value in values.items() if value is not None}
        return parse(values, tomli_w.dumps(values), where="tiny.toml")

    return make


@pytest.fixture
def sqlite(tmp_path: Path) -> str:
    """URL of a SQLite storage that does not exist yet."""
    return f"sqlite:///{tmp_path}/tuner.db"


@pytest.fixture(scope="session")
def only_tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with all tables and nothing in them."""
    folder = tmp_path_factory.mktemp("tables")
    make_tables(f"sqlite:///{folder}/made.db")
    with contextlib.closing(sqlite3.connect(folder / "made.db")) as made:
        made.execute("VACUUM INTO ?", [f"{folder}/tuner.db"])
    return folder / "tuner.db"


@pytest.fixture
def make_session(
    tmp_path: Path, sqlite: str, only_tables: Path, make_file: MakeFile, digits: Data
) -> MakeSession:
    """Creates a study in the SQLite storage; arguments as ``make_file``."""

    def make(**sections: Any) -> Session:
        file = Path(sqlite.removeprefix("sqlite:///"))
        if not file.exists():
            shutil.copyfile(only_tables, file)
        store = FolderStore(tmp_path / "artifacts")
        return sessions.create(make_file(**sections), sqlite, store, digits)

    return make


@contextlib.contextmanager
def new_database(server_url: str, variable: str, drop: str = "") -> Iterator[str]:
    """An empty database on a server, gone afterwards; skips when there is no such server."""
    server = sqlalchemy.create_engine(server_url, isolation_level="AUTOCOMMIT")
    name = f"tuner_test_{uuid.uuid4().hex[:12]}"
    try:
        with server.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
    except sqlalchemy.exc.OperationalError as error:
        if REQUIRED:
            raise
        pytest.skip(f"no server at {variable}: {str(error).splitlines()[0]}")
    yield sqlalchemy.make_url(server_url).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} {drop}")
    server.dispose()


def new_postgres() -> contextlib.AbstractContextManager[str]:
    """An empty PostgreSQL database."""
    return new_database(POSTGRES, "TUNER_TEST_POSTGRES", "WITH (FORCE)")


def new_mariadb() -> contextlib.AbstractContextManager[str]:
    """An empty MariaDB database."""
    return new_database(MARIADB, "TUNER_TEST_MARIADB")


@pytest.fixture
def postgres() -> Iterator[str]:
    """URL of an empty PostgreSQL database that is dropped after the test."""
    with new_postgres() as url:
        yield url


@pytest.fixture
def mariadb() -> Iterator[str]:
    """URL of an empty MariaDB database that is dropped after the test."""
    with new_mariadb() as url:
        yield url


@pytest.fixture(params=SERVERS)
def database(request: pytest.FixtureRequest) -> str:
    """URL of an empty storage, on every kind of database in turn."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture(scope="session", params=SERVERS)
def tables(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """URL of a storage that has its tables and is shared by tests, each with its own study."""
    made = {"postgres": new_postgres, "mariadb": new_mariadb}
    file = f"sqlite:///{tmp_path_factory.mktemp('shared')}/tuner.db"
    with made.get(request.param, lambda: contextlib.nullcontext(file))() as url:
        make_tables(url)
        yield url


@pytest.fixture
def ledgers(tables: str) -> Iterator[Ledgers]:
    """A study with a ledger, and a way to open it as several workers do."""
    with contextlib.closing(Ledgers(tables)) as made:
        yield made


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a service of the S3 type in this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_settings(
    s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """Settings under which boto3 finds that service, in this process and its children."""
    from tuner.stores import _bucket

    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "not-so-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    _bucket._backend.cache_clear()
    yield settings
    _bucket._backend.cache_clear()


@pytest.fixture
def bucket(s3_settings: dict[str, str]) -> str:
    """A place for artifacts in a new bucket, as ``--artifacts`` takes it."""
    import boto3

    name = f"tuner-test-{uuid.uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/some/prefix"
