"""Statements that every epoch or trial needs, made once: making one costs more than running it.

Parameters are named ``of_...`` where they choose rows; what else is given is written.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState

from tuner.ledger._clock import by_dialect
from tuner.ledger._optuna import TRIALS, USER, chosen
from tuner.ledger._tables import attempts, controls, epochs, workers

CANDIDATES = 64
# The second says nothing new, but indexes know it.
HELD = attempts.c.holds.is_not(None) & attempts.c.ended_at.is_(None)

_STUDY: sa.BindParameter[int] = sa.bindparam("of_study", type_=sa.Integer)
_TRIAL: sa.BindParameter[int] = sa.bindparam("of_trial", type_=sa.Integer)
_TOKEN: sa.BindParameter[int] = sa.bindparam("of_token", type_=sa.Integer)
_WORKER: sa.BindParameter[str] = sa.bindparam("of_worker", type_=sa.String)
_AFTER: sa.BindParameter[int] = sa.bindparam("of_later_than", type_=sa.Integer)
_TIME: sa.BindParameter[float] = sa.bindparam("of_time", type_=sa.Double)


@cache
def standing() -> sa.Select[Any]:
    """The controls of a study."""
    return sa.select(controls).where(controls.c.study_id == _STUDY)


@cache
def generation() -> sa.Select[Any]:
    """The generation of a worker."""
    mine = (workers.c.study_id == _STUDY) & (workers.c.worker_id == _WORKER)
    return sa.select(workers.c.generation).where(mine).with_for_update()


@cache
def held() -> sa.Select[Any]:
    """What a worker's name holds."""
    own = (attempts.c.study_id == _STUDY) & (attempts.c.worker_id == _WORKER)
    return sa.select(attempts).where(own, HELD).with_for_update()


@cache
def waiting(dialect: str) -> sa.Select[Any]:
    """Waiting trials beyond an id: those of a baseline first, then by number."""
    baseline = sa.exists().where(USER.c.trial_id == TRIALS.c.trial_id, USER.c.key == "baseline")
    later = (TRIALS.c.study_id == _STUDY) & (TRIALS.c.trial_id > _AFTER)
    statement = (
        sa.select(TRIALS.c.trial_id)
        .where(later, TRIALS.c.state == TrialState.WAITING)
        .order_by(sa.case((baseline, 0), else_=1), TRIALS.c.number)
        .limit(CANDIDATES)
    )
    if dialect == "postgresql":
        # One row: it skips what others are about to take. MySQL would lock all it sorts.
        return statement.limit(1).with_for_update(skip_locked=True, of=TRIALS)
    return statement


@cache
def alike(dialect: str) -> sa.Select[Any]:
    """Waiting trials of one rung, named as JSON, by number; at most ``of_most`` of them."""
    of_rung = sa.exists().where(
        USER.c.trial_id == TRIALS.c.trial_id,
        USER.c.key == "fidelity",
        USER.c.value_json == sa.bindparam("of_rung", type_=sa.String),
    )
    later = (TRIALS.c.study_id == _STUDY) & (TRIALS.c.trial_id > _AFTER)
    statement = (
        sa.select(TRIALS.c.trial_id)
        .where(later, TRIALS.c.state == TrialState.WAITING, of_rung)
        .order_by(TRIALS.c.number)
        .limit(sa.bindparam("of_most", type_=sa.Integer))
    )
    if dialect == "postgresql":
        return statement.with_for_update(skip_locked=True, of=TRIALS)
    return statement


@cache
def still_waiting(dialect: str) -> sa.Select[Any]:
    """Those of the trials ``ids`` that wait, locked, by number."""
    own = chosen(dialect, TRIALS.c.trial_id), TRIALS.c.state == TrialState.WAITING
    return sa.select(TRIALS.c.trial_id).where(*own).order_by(TRIALS.c.number).with_for_update()


@cache
def beginning(dialect: str) -> sa.Select[Any]:
    """The time, and when a study started."""
    started = sa.select(controls.c.started_at).where(controls.c.study_id == _STUDY)
    now = by_dialect(dialect).label("at")
    return sa.select(now, started.scalar_subquery().label("started_at"))


@cache
def attempting(dialect: str) -> sa.Insert:
    """Insert an attempt at each of the trials ``ids``."""
    earlier = attempts.alias("earlier")
    tried = sa.select(sa.func.count()).where(earlier.c.trial_id == TRIALS.c.trial_id)
    values = {
        "study_id": TRIALS.c.study_id,
        "trial_id": TRIALS.c.trial_id,
        "holds": TRIALS.c.trial_id,
        "attempt": tried.scalar_subquery() + 1,
        "worker_id": _WORKER,
        "generation": sa.bindparam("of_generation", type_=sa.Integer),
        "claimed_at": _TIME,
        "heartbeat_at": _TIME,
        "lease_until": sa.bindparam("of_lease_until", type_=sa.Double),
    }
    tickets = sa.select(*values.values()).where(chosen(dialect, TRIALS.c.trial_id))
    return sa.insert(attempts).from_select(list(values), tickets.order_by(TRIALS.c.number))


@cache
def leases(dialect: str) -> sa.Select[Any]:
    """The leases on the trials ``ids``, by number."""
    names = ("token", "study_id", "trial_id", "attempt", "worker_id", "generation")
    held = sa.select(*(attempts.c[name] for name in names), TRIALS.c.number)
    both = held.join_from(attempts, TRIALS, attempts.c.holds == TRIALS.c.trial_id)
    return both.where(chosen(dialect, attempts.c.holds)).order_by(TRIALS.c.number)


@cache
def ticket(dialect: str) -> sa.Select[Any]:
    """Number of a trial, how often it was tried, the time, and when its study started."""
    earlier = sa.select(sa.func.count()).where(attempts.c.trial_id == _TRIAL)
    started = sa.select(controls.c.started_at).where(controls.c.study_id == TRIALS.c.study_id)
    return sa.select(
        TRIALS.c.number,
        earlier.scalar_subquery().label("earlier"),
        started.scalar_subquery().label("started_at"),
        by_dialect(dialect).label("at"),
    ).where(TRIALS.c.trial_id == _TRIAL)


@cache
def starting() -> sa.Update:
    """Note when a study started."""
    first = (controls.c.study_id == _STUDY) & controls.c.started_at.is_(None)
    return sa.update(controls).where(first)


@cache
def attempt(dialect: str) -> sa.Select[Any]:
    """An attempt, and the time."""
    now = by_dialect(dialect).label("at")
    return sa.select(attempts, now).where(attempts.c.token == _TOKEN)


@cache
def ending(dialect: str) -> sa.Select[Any]:
    """The attempts ``ids`` and the states of their trials, locked in their order; the time."""
    now = by_dialect(dialect).label("at")
    rows = sa.select(attempts, TRIALS.c.state, now)
    both = rows.join_from(attempts, TRIALS, attempts.c.trial_id == TRIALS.c.trial_id)
    own = both.where(chosen(dialect, attempts.c.token))
    return own.order_by(attempts.c.token).with_for_update()


@cache
def trimming(dialect: str, table: sa.Table, step: str) -> sa.Delete:
    """Delete steps of the trials ``ids`` beyond the last epochs of their attempts ``tokens``."""
    last = sa.select(attempts.c.epoch).where(
        chosen(dialect, attempts.c.token, "tokens"), attempts.c.trial_id == table.c.trial_id
    )
    own = chosen(dialect, table.c.trial_id)
    return sa.delete(table).where(own, table.c[step] > last.scalar_subquery())


@cache
def holding() -> sa.Update:
    """Change an attempt, if it still holds its trial.

    Somebody may have ended the trial through Optuna: then there is nothing to hold.
    """
    runs = sa.exists().where(TRIALS.c.trial_id == _TRIAL, TRIALS.c.state == TrialState.RUNNING)
    return sa.update(attempts).where(attempts.c.token == _TOKEN, attempts.c.holds == _TRIAL, runs)


@cache
def renewing(dialect: str, reported: int) -> sa.Update:
    """Renew a lease by ``of_seconds``; count those of ``of_epoch_0`` and so on that are new."""
    now, seconds = by_dialect(dialect), sa.bindparam("of_seconds", type_=sa.Double)
    renewed: dict[str, Any] = {"heartbeat_at": now, "lease_until": now + seconds}
    reached = sa.select(sa.func.max(epochs.c.epoch)).where(epochs.c.trial_id == _TRIAL)
    last = sa.func.coalesce(reached.scalar_subquery(), -1)
    for i in range(reported):
        is_new = sa.bindparam(f"of_epoch_{i}", type_=sa.Integer) > last
        known = renewed.get("new_epochs", attempts.c.new_epochs)
        renewed["new_epochs"] = known + sa.case((is_new, 1), else_=0)
    return holding().values(renewed)


@cache
def renewing_all(dialect: str) -> sa.Update:
    """Renew the leases of the attempts ``ids`` by ``of_seconds``."""
    now, seconds = by_dialect(dialect), sa.bindparam("of_seconds", type_=sa.Double)
    renewed = {"heartbeat_at": now, "lease_until": now + seconds}
    return sa.update(attempts).where(chosen(dialect, attempts.c.token)).values(renewed)


@cache
def spending() -> sa.Update:
    """Add ``of_seconds`` to what a study spent."""
    spent = controls.c.spent + sa.bindparam("of_seconds", type_=sa.Double)
    return sa.update(controls).where(controls.c.study_id == _STUDY).values(spent=spent)
