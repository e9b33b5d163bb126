"""What many tests need: one thread, a tiny study, and the services that may be there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import torch

from tuner import session as sessions
from tuner.datasets import DATASETS, Data
from tuner.session import Session
from tuner.study import StudyFile, parse

POSTGRES = os.environ.get(
    "TUNER_TEST_POSTGRES", "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
)
REQUIRED = os.environ.get("TUNER_REQUIRE_SERVICES") == "1"

MakeFile = Callable[..., StudyFile]
MakeSession = Callable[..., Session]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


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


@pytest.fixture
def make_session(tmp_path: Path, sqlite: str, make_file: MakeFile, digits: Data) -> MakeSession:
    """Creates a study in the SQLite storage; arguments as ``make_file``."""

    def make(**sections: Any) -> Session:
        return sessions.create(make_file(**sections), sqlite, tmp_path / "artifacts", digits)

    return make


@pytest.fixture
def postgres() -> Iterator[str]:
    """URL of an empty PostgreSQL database that is dropped after the test."""
    server = sqlalchemy.create_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    name = f"tuner_test_{uuid.uuid4().hex[:12]}"
    try:
        with server.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
    except sqlalchemy.exc.OperationalError as error:
        if REQUIRED:
            raise
        pytest.skip(f"no PostgreSQL at TUNER_TEST_POSTGRES: {str(error).splitlines()[0]}")
    yield sqlalchemy.make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    server.dispose()
