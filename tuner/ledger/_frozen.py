"""Whole trials, read from Optuna's tables in bulk."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from typing import Any

import sqlalchemy as sa
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.engine import Connection, Row

from tuner.ledger._optuna import PARAMS, STEPS, SYSTEM, TRIALS, USER, VALUES, chosen

# Old SQLite takes 999 values in a statement, and each id is in one five times.
CHUNK = 190


def read(connection: Connection, ids: Sequence[int]) -> list[FrozenTrial]:
    """Whole trials of these ids, by id."""
    found: list[FrozenTrial] = []
    for begin in range(0, len(ids), CHUNK):
        found += _read_chunk(connection, ids[begin : begin + CHUNK])
    return found


def _read_chunk(connection: Connection, ids: Sequence[int]) -> list[FrozenTrial]:
    dialect, given = connection.dialect.name, {"ids": list(ids)}
    parts: dict[tuple[str, int], dict[Any, Any]] = defaultdict(dict)
    params: dict[int, list[tuple[int, str, float, str]]] = defaultdict(list)
    trials = connection.execute(_trials(dialect), given).all()
    for part, trial_id, name, text, number, place in connection.execute(_parts(dialect), given):
        if part == "param":
            params[trial_id].append((place, name, number, text))
        elif part in ("user", "system"):
            parts[part, trial_id][name] = json.loads(text)
        else:
            parts[part, trial_id][place] = _number(part, number, text)
    return [_trial(row, parts, params[row.trial_id]) for row in trials]


@cache
def _trials(dialect: str) -> sa.Select[Any]:
    rows = sa.select(TRIALS).where(chosen(dialect, TRIALS.c.trial_id))
    return rows.order_by(TRIALS.c.trial_id)


@cache
def _parts(dialect: str) -> sa.CompoundSelect[Any]:
    """What belongs to trials, in one statement: part, trial, name, text, number, place.

    One statement instead of five: with many workers, most of what a server does is this.
    """
    selects = [
        sa.select(sa.literal_column(f"'{part}'"), table.c.trial_id, *four).where(
            chosen(dialect, table.c.trial_id)
        )
        for part, (table, four) in _columns(dialect).items()
    ]
    return sa.union_all(*selects)


def _columns(dialect: str) -> dict[str, tuple[sa.Table, tuple[sa.ColumnElement[Any], ...]]]:
    """The table of each part, and its columns: name, text, number, place."""
    text: sa.ColumnElement[str] = sa.literal_column("''")
    number: sa.ColumnElement[float] = sa.literal_column("0.0")
    place: sa.ColumnElement[int] = sa.literal_column("0")
    params, values, steps = PARAMS.c, VALUES.c, STEPS.c
    param = (params.param_name, params.distribution_json, params.param_value, params.param_id)
    value = (text, _as_text(dialect, values.value_type), values.value, values.objective)
    kind = _as_text(dialect, steps.intermediate_value_type)
    step = (text, kind, steps.intermediate_value, steps.step)
    return {
        "user": (USER, (USER.c.key, USER.c.value_json, number, place)),
        "system": (SYSTEM, (SYSTEM.c.key, SYSTEM.c.value_json, number, place)),
        "param": (PARAMS, param),
        "value": (VALUES, value),
        "step": (STEPS, step),
    }


def _as_text(dialect: str, column: sa.ColumnElement[Any]) -> sa.ColumnElement[str]:
    # Only PostgreSQL has a type of its own for these; MySQL must keep the collation.
    if dialect == "postgresql":
        return sa.cast(column, sa.String)
    return sa.type_coerce(column, sa.String)


def _number(part: str, number: float | None, kind: str) -> float:
    if part == "value":
        values = models.TrialValueModel
        return values.stored_repr_to_value(number, values.TrialValueType[kind])
    steps = models.TrialIntermediateValueModel
    kinds = steps.TrialIntermediateValueType
    return steps.stored_repr_to_intermediate_value(number, kinds[kind])


def _trial(
    row: Row[Any],
    parts: Mapping[tuple[str, int], dict[Any, Any]],
    params: list[tuple[int, str, float, str]],
) -> FrozenTrial:
    trial_id = row.trial_id
    values = parts["value", trial_id]
    suggested = [(name, number, _distribution(text)) for _, name, number, text in sorted(params)]
    return FrozenTrial(
        number=row.number,
        state=row.state,
        value=None,
        values=[values[objective] for objective in sorted(values)] or None,
        datetime_start=_local(row.datetime_start),
        datetime_complete=_local(row.datetime_complete),
        params={name: kind.to_external_repr(number) for name, number, kind in suggested},
        distributions={name: kind for name, _, kind in suggested},
        user_attrs=parts["user", trial_id],
        system_attrs=parts["system", trial_id],
        intermediate_values=dict(sorted(parts["step", trial_id].items())),
        trial_id=trial_id,
    )


@lru_cache(maxsize=4096)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)


def _local(moment: datetime | None) -> datetime | None:
    """A stored time as Optuna 5 hands it out: local, without saying so."""
    if moment is None:
        return None
    return moment.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
