"""Make and migrate Tuner's own tables, with a version table of their own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from tuner.engines import insist, reading
from tuner.errors import StorageError
from tuner.ledger._clock import has_zero, set_zero

VERSION_TABLE = "tuner_version"
PATIENCE_SECONDS = 60.0
FOLDER = Path(__file__).with_name("migrations")


@cache
def newest() -> str:
    """Version of the tables this program works with."""
    from alembic.script import ScriptDirectory

    head = ScriptDirectory(str(FOLDER)).get_current_head()
    assert head is not None
    return head


def version(connection: Connection) -> str | None:
    """Version of the tables in the database; None when there are none."""
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    name: str | None = connection.execute(
        sa.text(f"SELECT version_num FROM {VERSION_TABLE}")
    ).scalar()
    return name


def prepared(engine: Engine) -> bool:
    """Whether there is nothing to ``prepare``; nothing is written."""
    return insist(lambda: _prepared(engine), patience=PATIENCE_SECONDS)


def _prepared(engine: Engine) -> bool:
    with engine.connect().execution_options(**reading(engine)) as connection:
        return version(connection) == newest() and has_zero(connection)


def newer(engine: Engine) -> str | None:
    """Version of tables that a newer program wrote, else None; nothing is written."""
    known = insist(lambda: _read_version(engine), patience=PATIENCE_SECONDS)
    return known if known is not None and known > newest() else None


def _read_version(engine: Engine) -> str | None:
    with engine.connect().execution_options(**reading(engine)) as connection:
        return version(connection)


def prepare(engine: Engine) -> None:
    """Bring the tables to this program's version; call it under ``storage.exclusive``.

    Raises:
        StorageError: They are of a newer program.
    """
    insist(lambda: _prepare(engine), patience=PATIENCE_SECONDS)


def _prepare(engine: Engine) -> None:
    with engine.begin() as connection:
        known = version(connection)
    if known != newest():
        _migrate(engine, known)
    with engine.begin() as connection:
        set_zero(connection)


def _migrate(engine: Engine, known: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    revisions = {script.revision for script in ScriptDirectory(str(FOLDER)).walk_revisions()}
    if known is not None and known not in revisions:
        raise StorageError(
            f"the storage's tuner tables have version {known}, this program knows "
            f"{newest()}; use the newer Tuner that wrote them"
        )
    config = Config()
    config.set_main_option("script_location", str(FOLDER).replace("%", "%%"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
