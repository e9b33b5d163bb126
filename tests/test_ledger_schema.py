"""Our tables: made once, migrated on their own, refused when they are from the future."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from conftest import MakeFile
from ledgers import Ledgers, claimed, enter, in_processes, make_tables
from optuna.storages import RDBStorage

from tuner import session as sessions
from tuner.datasets import Data
from tuner.engines import make_engine
from tuner.errors import StorageError
from tuner.ledger import Ledger, newest, prepare, version
from tuner.ledger._schema import VERSION_TABLE
from tuner.ledger._tables import attempts, metadata
from tuner.storage import exclusive, open_storage
from tuner.stores import FolderStore


def test_the_tables_are_those_the_program_works_with(tables: str) -> None:
    engine = make_engine(tables)
    with engine.connect() as connection:
        options = {"include_name": lambda name, kind, _: kind != "table" or is_ours(name)}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []
        assert version(connection) == newest()
    engine.dispose()


def is_ours(name: str | None) -> bool:
    return str(name).startswith("tuner_") and name != VERSION_TABLE


def test_a_difference_to_the_tables_would_be_found(sqlite: str) -> None:
    make_tables(sqlite)
    engine = make_engine(sqlite)
    other = sa.MetaData()
    for table in metadata.sorted_tables:
        table.to_metadata(other)
    other.tables["tuner_attempts"].append_column(sa.Column("new", sa.Integer))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"include_name": lambda n, kind, _: kind != "table" or is_ours(n)}
        )
        ((kind, *_),) = compare_metadata(context, other)
    assert kind == "add_column"


def test_our_version_is_not_optunas(tables: str) -> None:
    engine = make_engine(tables)
    with engine.connect() as connection:
        versions = {
            name: connection.execute(sa.text(f"SELECT version_num FROM {name}")).scalars().all()
            for name in ("alembic_version", "tuner_version")
        }
    assert versions == {
        "alembic_version": [RDBStorage("sqlite://").get_head_version()],
        "tuner_version": [newest()],
    }
    engine.dispose()


def test_a_study_optuna_made_before_us_is_left_as_it_is(database: str) -> None:
    plain = optuna.create_study(study_name="theirs", storage=RDBStorage(database))
    plain.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    before = plain.trials
    make_tables(database)
    assert optuna.load_study(study_name="theirs", storage=RDBStorage(database)).trials == before


def test_tables_of_a_newer_program_are_refused_and_left_as_they_are(
    database: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    make_tables(database)
    engine = make_engine(database)
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(StorageError, match="version 9999, this program knows 0001"):
        prepare(engine)
    with pytest.raises(StorageError, match="newer Tuner"):
        sessions.create(make_file(), database, FolderStore(tmp_path), digits)
    with engine.begin() as connection:
        assert version(connection) == "9999"
    engine.dispose()


def test_preparing_again_keeps_what_is_there(database: str) -> None:
    make_tables(database)
    ledgers = Ledgers(database)
    ledgers.enqueue({})
    claimed(ledgers.first, enter(ledgers.first))
    prepare(ledgers.first.engine)
    assert len(ledgers.first.attempts()) == 1
    ledgers.close()


def test_a_program_that_died_while_it_made_the_tables_does_not_stop_the_next_one(
    database: str,
) -> None:
    """MySQL ends a transaction with every table it makes."""
    make_tables(database)
    engine = make_engine(database)
    with engine.begin() as connection:
        connection.execute(sa.text(f"DELETE FROM {VERSION_TABLE}"))
        connection.execute(sa.text("DROP TABLE tuner_controls"))
        connection.execute(sa.text("DROP TABLE tuner_clocks"))
    prepare(engine)
    with engine.begin() as connection:
        assert version(connection) == newest()
    ledgers = Ledgers(database)
    ledgers.enqueue({})
    claimed(ledgers.first, enter(ledgers.first))
    ledgers.close()
    engine.dispose()


def test_who_reads_a_storage_of_an_older_program_is_told(tables: str) -> None:
    ledgers = Ledgers(tables)
    assert ledgers.first.ready()
    engine = ledgers.first.engine
    with engine.begin() as connection:
        connection.execute(sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '0000'"))
    try:
        assert not ledgers.first.ready()
    finally:
        with engine.begin() as connection:
            change = sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '{newest()}'")
            connection.execute(change)
        ledgers.close()


def test_a_token_is_never_given_again(database: str) -> None:
    make_tables(database)
    ledgers = Ledgers(database)
    ledgers.enqueue({}, {})
    first = claimed(ledgers.first, enter(ledgers.first))
    with ledgers.first.engine.begin() as connection:
        connection.execute(sa.delete(attempts))
    second = claimed(ledgers.first, enter(ledgers.first))
    assert second.token > first.token
    ledgers.close()


# Many at once


def _start(url: str, _number: int) -> tuple[int, bool, float]:
    """What every worker does first: a study's number, whether it queued, and how long it took."""
    began = time.monotonic()
    storage = open_storage(url)
    engine = make_engine(url)
    with exclusive(url):
        prepare(engine)
        study = optuna.create_study(
            study_name="one", storage=storage, direction="maximize", load_if_exists=True
        )
    ledger = Ledger(engine, study._study_id)
    ledger.prepare()
    queued = ledger.enqueue([({}, {})] * 5, 0)
    return study._study_id, queued, time.monotonic() - began


@pytest.mark.long
def test_sixteen_processes_may_start_on_an_empty_database(database: str) -> None:
    found = in_processes(_start, [(database, number) for number in range(16)])
    studies, queued, _ = zip(*found, strict=True)
    assert len(set(studies)) == 1
    assert sorted(queued) == [False] * 15 + [True]
    engine = make_engine(database)
    counts: dict[str, Any] = {}
    with engine.begin() as connection:
        for name in ("studies", "trials", "tuner_controls", "tuner_version", "alembic_version"):
            counts[name] = connection.execute(sa.text(f"SELECT COUNT(*) FROM {name}")).scalar()
    engine.dispose()
    assert counts == {
        "studies": 1,
        "trials": 5,
        "tuner_controls": 1,
        "tuner_version": 1,
        "alembic_version": 1,
    }
