"""Optuna's tables, written in bulk; ``_frozen`` reads them, and no other module knows them.

The layout is Optuna's schema v3.2.0.a, the same since 2023; ``tests/test_ledger_optuna.py``
compares everything written and read here with what Optuna itself writes and reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any, NamedTuple, cast

import sqlalchemy as sa
from optuna.storages._rdb import models
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from tuner.ledger._changes import Changes
from tuner.ledger._clock import by_dialect

Columns = Mapping[str, Any]


class Rows(NamedTuple):
    """Rows of one table, told apart by ``keys``; ``timed`` is a column that gets the time."""

    table: sa.Table
    keys: tuple[str, ...]
    rows: Sequence[Columns]
    timed: str | None = None


TRIALS = cast(sa.Table, models.TrialModel.__table__)
STUDIES = cast(sa.Table, models.StudyModel.__table__)
PARAMS = cast(sa.Table, models.TrialParamModel.__table__)
VALUES = cast(sa.Table, models.TrialValueModel.__table__)
STEPS = cast(sa.Table, models.TrialIntermediateValueModel.__table__)
USER = cast(sa.Table, models.TrialUserAttributeModel.__table__)
SYSTEM = cast(sa.Table, models.TrialSystemAttributeModel.__table__)
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


def upsert(
    connection: Connection,
    table: sa.Table,
    keys: tuple[str, ...],
    rows: Sequence[Columns],
    *,
    timed: str | None = None,
) -> None:
    """Insert ``rows``, each in place of the one with the same ``keys`` if there is one.

    ``timed`` is a column that gets the time by the shared clock.
    """
    if rows:
        dialect = connection.dialect.name
        # psycopg sends row after row, unless there are answers: then SQLAlchemy makes them one.
        together = len(rows) > 1 and dialect == "postgresql"
        statement = _upsert(dialect, table, keys, tuple(rows[0]), timed, together)
        connection.execute(statement, rows)


def chosen(
    dialect: str, column: sa.ColumnElement[Any], name: str = "ids"
) -> sa.ColumnElement[bool]:
    """Whether the column is one of ``ids``: as a list, where that makes one statement of all."""
    if dialect == "postgresql":
        return column == sa.any_(sa.bindparam(name, type_=sa.ARRAY(sa.Integer)))
    return column.in_(sa.bindparam(name, expanding=True))


@cache
def _upsert(
    dialect: str,
    table: sa.Table,
    keys: tuple[str, ...],
    names: tuple[str, ...],
    timed: str | None,
    answered: bool,
) -> Any:
    at = {} if timed is None else {timed: by_dialect(dialect)}
    others = [name for name in (*names, *at) if name not in keys]
    if dialect in ("mysql", "mariadb"):
        from sqlalchemy.dialects.mysql import insert as mysql_insert

        first = mysql_insert(table).values(at) if at else mysql_insert(table)
        return first.on_duplicate_key_update({name: first.inserted[name] for name in others})
    if dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    statement = insert(table).values(at) if at else insert(table)
    new = {name: statement.excluded[name] for name in others}
    done = statement.on_conflict_do_update(index_elements=keys, set_=new)
    return done.returning(*(table.c[key] for key in keys)) if answered else done


def write(connection: Connection, trial_id: int, changes: Changes) -> None:
    """Write a trial's parameters, attributes and intermediate values."""
    for kind in written(trial_id, changes):
        upsert(connection, kind.table, kind.keys, kind.rows)


def written(trial_id: int, changes: Changes) -> list[Rows]:
    """A trial's parameters, attributes and intermediate values as rows."""
    user = [_attribute(trial_id, key, value) for key, value in changes.user.items()]
    system = [_attribute(trial_id, key, value) for key, value in changes.system.items()]
    params = [
        {
            "trial_id": trial_id,
            "param_name": name,
            "param_value": value,
            "distribution_json": text,
        }
        for name, (value, text) in changes.params.items()
    ]
    found = [
        Rows(USER, ("trial_id", "key"), user),
        Rows(SYSTEM, ("trial_id", "key"), system),
        Rows(PARAMS, ("trial_id", "param_name"), params),
        Rows(STEPS, ("trial_id", "step"), _steps(trial_id, changes.steps)),
    ]
    return [kind for kind in found if kind.rows]


def _steps(trial_id: int, steps: Mapping[int, float]) -> list[Columns]:
    stored = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr
    rows: list[Columns] = []
    for step, value in steps.items():
        number, kind = stored(value)
        row = {"intermediate_value": number, "intermediate_value_type": kind}
        rows.append({"trial_id": trial_id, "step": step, **row})
    return rows


def _attribute(trial_id: int, key: str, value: Any) -> dict[str, Any]:
    return {"trial_id": trial_id, "key": key, "value_json": json.dumps(value)}


def lock(connection: Connection, study_id: int) -> None:
    """Keep others who ask for the study's lock waiting until the transaction ends."""
    own = sa.select(STUDIES.c.study_id).where(STUDIES.c.study_id == study_id)
    connection.execute(own.with_for_update())


def enqueue(
    connection: Connection,
    study_id: int,
    tickets: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    expected: int,
) -> bool:
    """Add waiting trials with fixed parameters and user attributes, numbered on from the last.

    Returns:
        Whether they were added: only if the study has ``expected`` trials so far.
    """
    lock(connection, study_id)
    count = sa.select(sa.func.count()).where(TRIALS.c.study_id == study_id)
    if connection.execute(count).scalar_one() != expected:
        return False
    if not tickets:
        return True
    numbers = range(expected, expected + len(tickets))
    rows = [{"study_id": study_id, "number": n, "state": TrialState.WAITING} for n in numbers]
    connection.execute(sa.insert(TRIALS), rows)
    new = sa.select(TRIALS.c.number, TRIALS.c.trial_id).where(
        TRIALS.c.study_id == study_id, TRIALS.c.number >= expected
    )
    ids = {row.number: row.trial_id for row in connection.execute(new)}
    pairs = list(zip((ids[n] for n in numbers), tickets, strict=True))
    fixed = [_attribute(i, "fixed_params", dict(params)) for i, (params, _) in pairs]
    connection.execute(sa.insert(SYSTEM), fixed)
    user = [_attribute(i, key, value) for i, (_, attrs) in pairs for key, value in attrs.items()]
    if user:
        connection.execute(sa.insert(USER), user)
    return True


def start(connection: Connection, trial_id: int, at: float) -> bool:
    """Set a trial running if it waits; when it first began stays."""
    change = _change(TrialState.WAITING, TrialState.RUNNING)
    now = {"of_trial": trial_id, "of_moment": moment(at)}
    return connection.execute(change, now).rowcount == 1


def start_all(connection: Connection, trial_ids: Sequence[int], at: float) -> None:
    """Set waiting trials running, as ``start`` does with one."""
    change = _change(TrialState.WAITING, TrialState.RUNNING, connection.dialect.name)
    connection.execute(change, {"ids": list(trial_ids), "of_moment": moment(at)})


def put_back(connection: Connection, trial_id: int) -> None:
    """Set a running trial waiting."""
    connection.execute(_change(TrialState.RUNNING, TrialState.WAITING), {"of_trial": trial_id})


@cache
def _change(before: TrialState, after: TrialState, many: str | None = None) -> sa.Update:
    """Give the trial ``of_trial`` another state if it has this one; note when it first ran.

    ``many`` is the dialect of a statement for the trials ``ids``.
    """
    own = TRIALS.c.trial_id == sa.bindparam("of_trial", type_=sa.Integer)
    if many is not None:
        own = chosen(many, TRIALS.c.trial_id)
    values: dict[str, Any] = {"state": after}
    if after == TrialState.RUNNING:
        moment = sa.bindparam("of_moment", type_=sa.DateTime)
        values["datetime_start"] = sa.func.coalesce(TRIALS.c.datetime_start, moment)
    return sa.update(TRIALS).where(own, TRIALS.c.state == before).values(values)


def end(
    connection: Connection,
    trial_id: int,
    state: TrialState,
    values: Sequence[float] | None,
    at: float,
) -> bool:
    """End a trial in a final state, with its values, if it runs."""
    done = {"of_trial": trial_id, "datetime_complete": moment(at)}
    if connection.execute(_change(TrialState.RUNNING, state), done).rowcount != 1:
        return False
    write_values(connection, {trial_id: values})
    return True


def end_all(connection: Connection, trial_ids: Sequence[int], state: TrialState, at: float) -> None:
    """Give running trials a final state, or set them waiting."""
    given: dict[str, Any] = {"ids": list(trial_ids)}
    if state in FINISHED:
        given["datetime_complete"] = moment(at)
    change = _change(TrialState.RUNNING, state, connection.dialect.name)
    connection.execute(change, given)


def write_values(connection: Connection, values: Mapping[int, Sequence[float] | None]) -> None:
    """Write the values of trials, by their ids."""
    stored = models.TrialValueModel.value_to_stored_repr
    rows = []
    for trial_id, own in values.items():
        for objective, value in enumerate(own or ()):
            number, kind = stored(value)
            row = {"trial_id": trial_id, "objective": objective}
            rows.append({**row, "value": number, "value_type": kind})
    upsert(connection, VALUES, ("trial_id", "objective"), rows)


def moment(seconds: float) -> datetime:
    """Seconds since 1970 as Optuna 5 stores times: UTC without saying so."""
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
