"""What PostgreSQL, MySQL and MariaDB say of themselves, and Optuna's tables of theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy
from sqlalchemy.engine import Connection

from tuner.doctor._finding import Finding, fail, ok, warn

PER_SLOT = 2
FEW, NONE = 20, 3
ROOM = "fewer workers, a larger max_connections, or tuner proxy in front, which shares a few"


def ask(connection: Connection, question: str, **values: Any) -> Any:
    """The first cell of the answer to an SQL question."""
    return connection.execute(sqlalchemy.text(question), values).scalar()


def software(connection: Connection) -> str:
    """The server and its version."""
    dialect = connection.dialect.name
    if dialect == "sqlite":
        return f"SQLite {ask(connection, 'SELECT sqlite_version()')}"
    if dialect == "postgresql":
        size = ask(connection, "SELECT pg_size_pretty(pg_database_size(current_database()))")
        return f"PostgreSQL {ask(connection, 'SHOW server_version')}, database of {size}"
    found = str(ask(connection, "SELECT VERSION()"))
    return f"{'MariaDB' if 'maria' in found.lower() else 'MySQL'} {found}"


def optuna_version(connection: Connection) -> str | None:
    """Version of Optuna's tables; None when there are none."""
    if not sqlalchemy.inspect(connection).has_table("alembic_version"):
        return None
    found = ask(connection, "SELECT version_num FROM alembic_version")
    return None if found is None else str(found)


@cache
def optuna_head() -> str | None:
    """The version of tables that this Optuna wants."""
    from alembic.script import ScriptDirectory
    from optuna.storages import _rdb

    return ScriptDirectory(str(Path(str(_rdb.__file__)).with_name("alembic"))).get_current_head()


def connections(connection: Connection) -> Finding:
    """How many connections the server has left for us."""
    most, used = _counts(connection)
    free = most - used
    found = f"{used} of {most} in use, room for about {max(0, free) // PER_SLOT} slots"
    if free < FEW:
        return (fail if free < NONE else warn)("connections", found, ROOM)
    return ok("connections", found)


def _counts(connection: Connection) -> tuple[int, int]:
    """The most connections there can be for others than administrators, and those there are."""
    if connection.dialect.name == "postgresql":
        most = int(ask(connection, "SHOW max_connections"))
        kept = int(ask(connection, "SHOW superuser_reserved_connections"))
        own = ask(connection, "SELECT rolconnlimit FROM pg_roles WHERE rolname = current_user")
        used = int(ask(connection, "SELECT sum(numbackends) FROM pg_stat_database"))
        return min(most - kept, own if own is not None and own >= 0 else most), used
    most = int(ask(connection, "SELECT @@max_connections"))
    own = int(ask(connection, "SELECT @@max_user_connections"))
    row = connection.execute(sqlalchemy.text("SHOW STATUS LIKE 'Threads_connected'")).one()
    return min(most, own or most), int(row[1])


def rights(connection: Connection) -> Iterator[Finding]:
    """Whether this role may make tables; that it may write is seen when it does."""
    postgresql = connection.dialect.name == "postgresql"
    may = _may_create(connection) if postgresql else _granted_create(connection)
    if may:
        yield ok("rights", "this role may make tables")
    else:
        yield warn(
            "rights",
            "this role may not make tables",
            "workers need not; tuner create and a new version do: run them with another role",
        )


def _may_create(connection: Connection) -> bool:
    question = "SELECT has_schema_privilege(current_schema(), 'CREATE')"
    return bool(ask(connection, question))


def _granted_create(connection: Connection) -> bool:
    """Whether a GRANT says so; one to a role within a role is not followed."""
    database = str(connection.engine.url.database)
    for (line,) in connection.execute(sqlalchemy.text("SHOW GRANTS")):
        found = re.match(r"GRANT (.+) ON (\S+)\.\* TO ", str(line))
        if found is None:
            continue
        powers, place = found[1].upper().split(", "), found[2].strip("`").replace("\\", "")
        if place in ("*", database) and {"ALL PRIVILEGES", "CREATE"} & set(powers):
            return True
    return False
