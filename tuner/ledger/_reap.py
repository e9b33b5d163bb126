"""Attempts whose worker is gone: their trials wait again, or end; each within a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import Connection, Row

from tuner.ledger import _optuna
from tuner.ledger._changes import Changes
from tuner.ledger._clock import now, read_now
from tuner.ledger._optuna import TRIALS
from tuner.ledger._statements import HELD, spending
from tuner.ledger._tables import attempts, workers

# Attempts in a row that died without one epoch more than was known: the trial kills them.
MAX_LOST = 5


def reap(
    connection: Connection, study_id: int, dead: Sequence[tuple[str, int]], *, overdue: bool = True
) -> list[int]:
    """Put the trials of ``dead`` workers back, and of leases that are overdue; their numbers."""
    if not (dead or overdue):
        return []
    _mark_lost(connection, study_id, dead, overdue)
    expired = (
        sa.select(attempts)
        .where(attempts.c.study_id == study_id, HELD, _gone(connection, attempts, dead, overdue))
        .with_for_update(skip_locked=True)
    )
    numbers = []
    for row in connection.execute(expired).all():
        dead_names = [name for name, generation in dead if generation == row.generation]
        reason = "process gone" if row.worker_id in dead_names else "lease ran out"
        lose(connection, row, reason)
        numbers.append(row.trial_id)
    found = sa.select(TRIALS.c.number).where(TRIALS.c.trial_id.in_(numbers))
    return sorted(connection.execute(found).scalars()) if numbers else []


def _gone(
    connection: Connection, table: sa.Table, dead: Sequence[tuple[str, int]], overdue: bool
) -> sa.ColumnElement[bool]:
    gone = table.c.lease_until < now(connection) if overdue else sa.false()
    for worker_id, generation in dead:
        gone |= (table.c.worker_id == worker_id) & (table.c.generation == generation)
    return gone


def _mark_lost(
    connection: Connection, study_id: int, dead: Sequence[tuple[str, int]], overdue: bool
) -> None:
    """Say of workers that are gone that they are; one that comes to itself says otherwise."""
    there = (workers.c.study_id == study_id) & workers.c.state.not_in(("left", "lost"))
    silent = there & _gone(connection, workers, dead, overdue)
    ids = sa.select(workers.c.worker_id).where(silent)
    names = connection.execute(ids).scalars().all()
    if names:
        change = sa.update(workers).where(silent, workers.c.worker_id.in_(names))
        connection.execute(change.values(state="lost"))


def lose(connection: Connection, row: Row[Any], reason: str) -> bool:
    """End an attempt as lost; whether its trial may be tried again, and so waits."""
    at = read_now(connection)
    ended = {"holds": None, "ended_at": at, "end": "lost", "reason": reason}
    held = (attempts.c.token == row.token) & HELD
    if connection.execute(sa.update(attempts).where(held).values(ended)).rowcount != 1:
        return False
    spend(connection, row.study_id, row.seconds)
    earlier = sa.select(attempts.c.new_epochs).where(
        attempts.c.trial_id == row.trial_id, attempts.c.end == "lost"
    )
    progress = connection.execute(earlier.order_by(attempts.c.token)).scalars().all()
    if any(progress[-MAX_LOST:]) or len(progress) < MAX_LOST:
        _optuna.put_back(connection, row.trial_id)
        return True
    if _optuna.end(connection, row.trial_id, TrialState.FAIL, None, at):
        detail = f"{MAX_LOST} attempts in a row lost their worker within an epoch; last: {reason}"
        _optuna.write(connection, row.trial_id, Changes(user={"reason": "lost", "detail": detail}))
    return False


def spend(connection: Connection, study_id: int, seconds: float) -> None:
    """Add the training seconds of an attempt that ended to those of the study."""
    connection.execute(spending(), {"of_study": study_id, "of_seconds": seconds})
