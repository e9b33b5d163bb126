"""Tickets and attempts: claim, renew, write, release, finish; each within a transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import Connection, Row

from tuner.ledger import _optuna, _statements
from tuner.ledger._changes import Changes, Lease, LeaseLostError
from tuner.ledger._optuna import STEPS, TRIALS
from tuner.ledger._reap import lose, spend
from tuner.ledger._tables import attempts, controls, epochs

SAME_ERRORS = 3


def claim(
    connection: Connection,
    study_id: int,
    worker: tuple[str, int],
    lease_seconds: float,
    mark: int = 0,
    beside: Sequence[int] = (),
) -> Lease | None:
    """Give the worker (name, generation) its own trial back, or the next ticket; None: no more.

    All trials up to ``mark`` are known to have ended. ``beside`` are leases, by their tokens,
    that the worker knows it has.
    """
    own = {"of_study": study_id, "of_worker": worker[0]}
    for row in connection.execute(_statements.held(), own).all():
        if row.token in beside:
            continue
        if row.generation == worker[1]:
            # The claim was written, but its answer did not arrive.
            return _lease(connection, row)
        if lose(connection, row, "worker restarted"):
            taken = _take(connection, study_id, row.trial_id, worker, lease_seconds)
            if taken is not None:
                return taken
    waiting = _statements.waiting(connection.dialect.name)
    later = {"of_study": study_id, "of_later_than": mark}
    for trial_id in connection.execute(waiting, later).scalars().all():
        taken = _take(connection, study_id, trial_id, worker, lease_seconds)
        if taken is not None:
            return taken
    return None


def _take(
    connection: Connection,
    study_id: int,
    trial_id: int,
    worker: tuple[str, int],
    lease_seconds: float,
) -> Lease | None:
    """Start an attempt at a trial, if it still waits."""
    found = connection.execute(_statements.ticket(connection.dialect.name), {"of_trial": trial_id})
    ticket = found.one()
    if not _optuna.start(connection, trial_id, ticket.at):
        return None
    values = {
        "study_id": study_id,
        "trial_id": trial_id,
        "attempt": ticket.earlier + 1,
        "worker_id": worker[0],
        "generation": worker[1],
    }
    times = dict.fromkeys(("claimed_at", "heartbeat_at"), ticket.at)
    lease = {"holds": trial_id, "lease_until": ticket.at + lease_seconds}
    done = connection.execute(sa.insert(attempts), values | times | lease)
    key: Any = done.inserted_primary_key
    if ticket.started_at is None:
        first = {"of_study": study_id, "started_at": ticket.at}
        connection.execute(_statements.starting(), first)
    return Lease(token=key[0], number=ticket.number, **values)


def _lease(connection: Connection, row: Row[Any]) -> Lease:
    number = sa.select(TRIALS.c.number).where(TRIALS.c.trial_id == row.trial_id)
    return Lease(
        token=row.token,
        study_id=row.study_id,
        trial_id=row.trial_id,
        number=connection.execute(number).scalar_one(),
        attempt=row.attempt,
        worker_id=row.worker_id,
        generation=row.generation,
    )


def write(
    connection: Connection,
    lease: Lease,
    changes: Changes,
    lease_seconds: float,
    progress: dict[str, Any],
) -> None:
    """Write changes and renew the lease, or raise.

    Raises:
        LeaseLostError: The lease is not held any more.
    """
    renewing = _statements.renewing(connection.dialect.name, len(changes.epochs))
    if not _hold(connection, lease, renewing, renewal(changes, lease_seconds, progress)):
        raise lost(lease)
    _record(connection, lease, changes)


def renewal(changes: Changes, lease_seconds: float, progress: dict[str, Any]) -> dict[str, Any]:
    """What ``_statements.renewing`` is given besides the lease: columns and parameters."""
    reported = {f"of_epoch_{i}": epoch for i, epoch in enumerate(changes.epochs)}
    last = {"epoch": max(changes.epochs)} if changes.epochs else {}
    return {"of_seconds": lease_seconds, **reported, **last, **progress}


def renew(connection: Connection, lease: Lease, lease_seconds: float) -> bool:
    """Renew the lease; whether it is still held."""
    renewing = _statements.renewing(connection.dialect.name, 0)
    return _hold(connection, lease, renewing, {"of_seconds": lease_seconds})


def lost(lease: Lease) -> LeaseLostError:
    """What to raise when a lease is not held any more."""
    return LeaseLostError(f"trial {lease.number} is not this worker's any more")


def _hold(connection: Connection, lease: Lease, change: sa.Update, values: dict[str, Any]) -> bool:
    """Change the attempt, which locks its row; whether it still holds its trial."""
    own = {"of_token": lease.token, "of_trial": lease.trial_id}
    return connection.execute(change, own | values).rowcount == 1


def _record(connection: Connection, lease: Lease, changes: Changes) -> None:
    for kind in written(lease, changes):
        _optuna.upsert(connection, kind.table, kind.keys, kind.rows, timed=kind.timed)


def written(lease: Lease, changes: Changes) -> list[_optuna.Rows]:
    """Changes as rows of Optuna's tables and ours."""
    rows = [
        {
            "trial_id": lease.trial_id,
            "epoch": epoch,
            "token": lease.token,
            "seconds": facts["seconds"],
            "samples": facts["samples"],
            "metrics": json.dumps(facts["metrics"]),
        }
        for epoch, facts in changes.epochs.items()
    ]
    own = [_optuna.Rows(epochs, ("trial_id", "epoch"), rows, "recorded_at")] if rows else []
    return _optuna.written(lease.trial_id, changes) + own


def finish(
    connection: Connection,
    lease: Lease,
    changes: Changes,
    *,
    state: TrialState,
    values: Sequence[float] | None = None,
    end: str,
    reason: str | None = None,
    detail: str | None = None,
    progress: dict[str, Any],
) -> None:
    """End the attempt, and the trial with it: ``WAITING`` puts it back into the queue.

    Raises:
        LeaseLostError: The lease is not held any more.
    """
    ended = {"end": end, "reason": reason, "detail": detail}
    seconds = _end(connection, lease, changes, state, values, ended, progress)
    # Last: all workers of a study change this row, and wait until its lock is gone.
    spend(connection, lease.study_id, seconds)


def _end(
    connection: Connection,
    lease: Lease,
    changes: Changes,
    state: TrialState,
    values: Sequence[float] | None,
    ended: dict[str, Any],
    progress: dict[str, Any],
) -> float:
    """End one attempt; the seconds it took, 0 if it had ended like this before."""
    found = connection.execute(
        _statements.attempt(connection.dialect.name), {"of_token": lease.token}
    )
    known = found.one()
    if was_written(known, ended["end"]):
        return 0.0
    ended = {"holds": None, "ended_at": known.at, **ended}
    if changes.epochs:
        ended["epoch"] = max(changes.epochs)
    then = {**ended, **progress, "heartbeat_at": known.at}
    if not _hold(connection, lease, _statements.holding(), then):
        raise lost(lease)
    _record(connection, lease, changes)
    if state == TrialState.WAITING:
        _optuna.put_back(connection, lease.trial_id)
    else:
        if lease.attempt > 1:
            _trim(connection, lease.trial_id, ended.get("epoch", known.epoch))
        if not _optuna.end(connection, lease.trial_id, state, values, known.at):
            raise lost(lease)
    return float(progress.get("seconds", known.seconds))


def was_written(known: Row[Any], end: str) -> bool:
    """Whether an attempt ended like this before, and only the answer did not arrive."""
    return known.holds is None and bool(known.end == end)


def _trim(connection: Connection, trial_id: int, last: int | None) -> None:
    """Forget epochs beyond the last one that counts: an attempt that was lost reached them."""
    for table, step in ((STEPS, STEPS.c.step), (epochs, epochs.c.epoch)):
        if last is not None:
            connection.execute(sa.delete(table).where(table.c.trial_id == trial_id, step > last))


def same_error(connection: Connection, study_id: int, signature: str) -> bool:
    """Whether the last trials of the study ended with this same error, one after another."""
    given = sa.select(controls.c.changed_at).where(controls.c.study_id == study_id)
    last = (
        sa.select(attempts.c.reason, attempts.c.note)
        .where(attempts.c.study_id == study_id)
        .where(attempts.c.end.in_(("complete", "pruned", "failed")))
        # What was cured and resumed since does not count.
        .where(attempts.c.ended_at > given.scalar_subquery())
        .order_by(attempts.c.ended_at.desc(), attempts.c.token.desc())
        .limit(SAME_ERRORS)
    )
    rows = connection.execute(last).all()
    return len(rows) == SAME_ERRORS and all(
        row.reason == "code_error" and row.note == signature for row in rows
    )
