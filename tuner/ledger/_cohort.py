"""Tickets and attempts of a cohort, in as few statements as those of one; within a transaction."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import Connection, Row

from tuner.ledger import _optuna, _statements
from tuner.ledger._changes import Ending, Lease
from tuner.ledger._optuna import STEPS, Columns
from tuner.ledger._queue import was_written, written
from tuner.ledger._reap import spend
from tuner.ledger._tables import attempts, epochs

T = TypeVar("T")

# Old SQLite takes 999 values in a statement, and some choose an attempt by two.
CHUNK = 450


def _chunks(items: Sequence[T]) -> Iterator[Sequence[T]]:
    return (items[begin : begin + CHUNK] for begin in range(0, len(items), CHUNK))


def claim(
    connection: Connection,
    study_id: int,
    worker: tuple[str, int],
    rung: str,
    most: int,
    lease_seconds: float,
    mark: int = 0,
) -> list[Lease]:
    """Give the worker up to ``most`` waiting trials of a rung; what it holds stays its own."""
    where = {"of_study": study_id, "of_later_than": mark, "of_rung": json.dumps(rung)}
    statement = _statements.alike(connection.dialect.name)
    found = connection.execute(statement, where | {"of_most": most}).scalars().all()
    taken: list[Lease] = []
    for ids in _chunks(found):
        taken += _take(connection, study_id, ids, worker, lease_seconds)
    return taken


def _take(
    connection: Connection,
    study_id: int,
    trial_ids: Sequence[int],
    worker: tuple[str, int],
    lease_seconds: float,
) -> list[Lease]:
    """Start an attempt at each of the trials that still waits."""
    dialect = connection.dialect.name
    locking = _statements.still_waiting(dialect)
    ids = list(connection.execute(locking, {"ids": list(trial_ids)}).scalars())
    if not ids:
        return []
    study = connection.execute(_statements.beginning(dialect), {"of_study": study_id}).one()
    _optuna.start_all(connection, ids, study.at)
    own = {"ids": ids, "of_worker": worker[0], "of_generation": worker[1]}
    times = {"of_time": study.at, "of_lease_until": study.at + lease_seconds}
    connection.execute(_statements.attempting(dialect), own | times)
    if study.started_at is None:
        first = {"of_study": study_id, "started_at": study.at}
        connection.execute(_statements.starting(), first)
    rows = connection.execute(_statements.leases(dialect), {"ids": ids})
    return [Lease(**row._asdict()) for row in rows]


def renew(connection: Connection, leases: Sequence[Lease], lease_seconds: float) -> None:
    """Renew leases; those that are not held any more stay as they are."""
    dialect = connection.dialect.name
    for part in _chunks(leases):
        known = connection.execute(_statements.ending(dialect), _tokens(part)).all()
        held = [row.token for row in known if _is_held(row)]
        renewed = {"ids": held, "of_seconds": lease_seconds}
        connection.execute(_statements.renewing_all(dialect), renewed)


def _tokens(leases: Iterable[Lease]) -> dict[str, list[int]]:
    return {"ids": [lease.token for lease in leases]}


def _is_held(row: Row[Any]) -> bool:
    """Whether an attempt holds its trial, and nobody has ended that through Optuna."""
    return row.holds is not None and row.state == TrialState.RUNNING


def finish(connection: Connection, study_id: int, endings: Sequence[Ending]) -> list[Lease]:
    """End many attempts, as ``_queue.finish`` ends one.

    Returns:
        The leases that are not held any more: nothing is written of their trials.
    """
    lost: list[Lease] = []
    seconds = 0.0
    for part in _chunks(endings):
        held, gone = _finish(connection, part)
        seconds += sum(each.seconds for each in held)
        lost += gone
    # Last: all workers of a study change this row, and wait until its lock is gone.
    spend(connection, study_id, seconds)
    return lost


def _finish(connection: Connection, endings: Sequence[Ending]) -> tuple[list[Ending], list[Lease]]:
    """End the attempts that hold their trials: which they are, and the leases that were lost."""
    tokens = _tokens(each.lease for each in endings)
    rows = connection.execute(_statements.ending(connection.dialect.name), tokens).all()
    known = {row.token: row for row in rows}
    held, lost = [], []
    for each in endings:
        row = known.get(each.lease.token)
        if row is not None and _is_held(row):
            held.append(each)
        elif row is None or not was_written(row, each.end):
            lost.append(each.lease)
    if held:
        _end(connection, held, known)
    return held, lost


def _end(connection: Connection, held: Sequence[Ending], known: Mapping[int, Row[Any]]) -> None:
    """End attempts whose rows, and those of their trials, are locked."""
    at = max(row.at for row in known.values())
    ended = [_ended(known[each.lease.token], each, at) for each in held]
    _optuna.upsert(connection, attempts, ("token",), ended)
    _record(connection, held, at)
    by_state: dict[TrialState, list[Lease]] = defaultdict(list)
    for each in held:
        by_state[TrialState[each.state]].append(each.lease)
    for state, leases in by_state.items():
        _optuna.end_all(connection, [lease.trial_id for lease in leases], state, at)
    over = [each for each in held if TrialState[each.state] != TrialState.WAITING]
    _trim(connection, [each.lease for each in over if each.lease.attempt > 1])
    _optuna.write_values(connection, {each.lease.trial_id: each.values for each in over})


def _ended(row: Row[Any], ending: Ending, at: float) -> Columns:
    """The row of an attempt that ends."""
    columns = {column.name: row._mapping[column] for column in attempts.c}
    last = {"epoch": max(ending.changes.epochs)} if ending.changes.epochs else {}
    told = {"end": ending.end, "reason": ending.reason, "detail": ending.detail}
    times = {"ended_at": at, "heartbeat_at": at, "seconds": ending.seconds}
    return {**columns, **last, **told, **times, "holds": None}


def _record(connection: Connection, endings: Sequence[Ending], at: float) -> None:
    """Write the changes of all trials, table by table."""
    found: dict[tuple[sa.Table, tuple[str, ...]], list[Columns]] = defaultdict(list)
    for each in endings:
        for kind in written(each.lease, each.changes):
            timed = {} if kind.timed is None else {kind.timed: at}
            found[kind.table, kind.keys] += [{**row, **timed} for row in kind.rows]
    for (table, keys), rows in found.items():
        _optuna.upsert(connection, table, keys, rows)


def _trim(connection: Connection, leases: Sequence[Lease]) -> None:
    """Forget epochs beyond the last one that counts: attempts that were lost reached them."""
    if not leases:
        return
    own = {"ids": [x.trial_id for x in leases], "tokens": [x.token for x in leases]}
    for table, step in ((STEPS, "step"), (epochs, "epoch")):
        connection.execute(_statements.trimming(connection.dialect.name, table, step), own)
