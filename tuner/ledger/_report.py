"""A report as one statement, for PostgreSQL: it is its own transaction, and one round trip."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, insert
from sqlalchemy.engine import Connection, Row

from tuner.ledger import _statements
from tuner.ledger._changes import Changes, Lease
from tuner.ledger._clock import by_dialect
from tuner.ledger._history import ended_beyond, first_open
from tuner.ledger._optuna import Rows
from tuner.ledger._queue import renewal, written
from tuner.ledger._tables import attempts, controls

POSTGRESQL = "postgresql"


def write(
    connection: Connection,
    lease: Lease,
    changes: Changes,
    lease_seconds: float,
    progress: dict[str, Any],
    mark: int,
) -> Row[Any] | None:
    """Write changes and renew the lease; None when it is not held any more: nothing is written.

    Returns:
        The study's controls; the time ``at`` and the training seconds of ``running`` attempts;
        the ids of trials beyond ``mark`` that ``ended``, and of the ``first`` that has not.
    """
    kinds = written(lease, changes)
    own = {"of_token": lease.token, "of_trial": lease.trial_id, "of_study": lease.study_id}
    values: dict[str, Any] = {**own, "study": lease.study_id, "mark": mark}
    renewed = renewal(changes, lease_seconds, progress)
    columns = tuple(name for name in renewed if name in attempts.c)
    values |= {f"new_{n}" if n in columns else n: value for n, value in renewed.items()}
    for place, kind in enumerate(kinds):
        for name in _listed(kind):
            values[f"{name}_{place}"] = [_plain(row[name]) for row in kind.rows]
    shape = tuple((kind.table, kind.keys, _listed(kind), kind.timed) for kind in kinds)
    text, fixed = _compiled(connection.dialect, len(changes.epochs), columns, shape)
    found = connection.exec_driver_sql(text, fixed | values).one()
    return found if found.held else None


def _listed(kind: Rows) -> tuple[str, ...]:
    """The columns whose values are lists; the others are the lease's."""
    return tuple(name for name in kind.rows[0] if name not in ("trial_id", "token"))


@lru_cache(maxsize=256)
def _compiled(dialect: sa.Dialect, *shape: Any) -> tuple[str, dict[str, Any]]:
    """A statement as text, with the values that are always the same.

    To look up what SQLAlchemy has compiled takes a third of what a report costs its worker.
    """
    compiled = _statement(*shape).compile(dialect=dialect)
    return compiled.string, {n: _plain(v) for n, v in compiled.params.items() if v is not None}


def _statement(
    reported: int, columns: tuple[str, ...], shape: tuple[tuple[Any, ...], ...]
) -> sa.Select[Any]:
    """Renew a lease, and write rows of every kind if it is held: they come from its row."""
    new = {name: sa.bindparam(f"new_{name}", type_=attempts.c[name].type) for name in columns}
    renewing = _statements.renewing(POSTGRESQL, reported).values(new)
    row = (attempts.c.trial_id, attempts.c.token, attempts.c.seconds)
    held = renewing.returning(*row).cte("held")
    answer = _answer(held)
    for place, kind in enumerate(shape):
        answer = answer.add_cte(_inserting(held, place, *kind))
    return answer


def _inserting(
    held: sa.CTE,
    place: int,
    table: sa.Table,
    keys: Sequence[str],
    names: Sequence[str],
    timed: str | None,
) -> sa.CTE:
    """Insert lists of values, each row in place of the one with the same keys."""
    lists = [sa.bindparam(f"{n}_{place}", type_=ARRAY(_type(table.c[n]))) for n in names]
    given = sa.func.unnest(*lists).table_valued(*names, name=f"new_{place}").render_derived()
    values = {name: _typed(given.c[name], table.c[name]) for name in names}
    values |= {name: held.c[name] for name in ("trial_id", "token") if name in table.c}
    if timed is not None:
        values[timed] = by_dialect(POSTGRESQL)
    rows = sa.select(*values.values()).select_from(held.join(given, sa.true()))
    statement = insert(table).from_select(list(values), rows, include_defaults=False)
    fresh = {name: statement.excluded[name] for name in values if name not in keys}
    done = statement.on_conflict_do_update(index_elements=keys, set_=fresh)
    return done.returning(table.c.trial_id).cte(f"written_{place}")


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def _type(column: sa.ColumnElement[Any]) -> sa.types.TypeEngine[Any]:
    """The type of a column's values in a list: for those of Optuna's own types, their names."""
    return sa.Text() if isinstance(column.type, sa.Enum) else column.type


def _typed(given: sa.ColumnElement[Any], column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    return sa.cast(given, column.type) if isinstance(column.type, sa.Enum) else given


def _answer(held: sa.CTE) -> sa.Select[Any]:
    """Whether the lease is held, what the fleet is told, and which trials ended.

    What the statement itself changes it does not see: its own attempt's seconds are ``held``'s.
    """
    counted = sa.select(sa.func.count().label("held")).select_from(held).subquery()
    study: sa.BindParameter[int] = sa.bindparam("of_study", type_=sa.Integer)
    token: sa.BindParameter[int] = sa.bindparam("of_token", type_=sa.Integer)
    others = sa.select(sa.func.coalesce(sa.func.sum(attempts.c.seconds), 0.0)).where(
        attempts.c.study_id == study, _statements.HELD, attempts.c.token != token
    )
    own = sa.select(sa.func.coalesce(sa.func.sum(held.c.seconds), 0.0))
    return sa.select(
        counted.c.held,
        controls.c.state,
        controls.c.reason,
        controls.c.detail,
        controls.c.started_at,
        controls.c.spent,
        by_dialect(POSTGRESQL).label("at"),
        (others.scalar_subquery() + own.scalar_subquery()).label("running"),
        ended_beyond().scalar_subquery().label("ended"),
        first_open().scalar_subquery().label("first"),
    ).select_from(counted.outerjoin(controls, controls.c.study_id == study))
