"""Workers and the orders they get; each function within a transaction."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from tuner.ledger import _optuna
from tuner.ledger._changes import Limits, Order, SupersededError, WorkerAliveError
from tuner.ledger._clock import now, read_now
from tuner.ledger._statements import HELD, generation, standing
from tuner.ledger._tables import attempts, controls, workers

GONE = ("left", "lost")


def register(
    connection: Connection,
    study_id: int,
    worker_id: str,
    facts: dict[str, Any],
    lease_seconds: float,
    *,
    dead: bool = False,
) -> int:
    """Enter a worker under a name that nobody alive has; its generation.

    ``dead`` says that the process which has the name is known to be gone.

    Raises:
        WorkerAliveError: Another process with this name has a lease that has not run out.
    """
    at = read_now(connection)
    mine = (workers.c.study_id == study_id) & (workers.c.worker_id == worker_id)
    # A row that is not there cannot be locked: the study's tells two newcomers apart.
    _optuna.lock(connection, study_id)
    row = connection.execute(sa.select(workers).where(mine).with_for_update()).first()
    known = ("machine", "host", "pid", "process", "device")
    values = {key: facts[key] for key in known} | {
        "state": "idle",
        "since": at,
        "heartbeat_at": at,
        "lease_until": at + lease_seconds,
        "facts": json.dumps({k: v for k, v in facts.items() if k not in known}),
    }
    if row is None:
        connection.execute(
            sa.insert(workers).values(
                study_id=study_id, worker_id=worker_id, generation=1, **values
            )
        )
        return 1
    same = row.machine == facts["machine"] and row.process == facts["process"]
    if not (dead or same or row.state in GONE or row.lease_until < at):
        raise WorkerAliveError(row._asdict())
    later = int(row.generation) + 1
    connection.execute(sa.update(workers).where(mine).values(generation=later, **values))
    return later


def beat(
    connection: Connection,
    study_id: int,
    worker: tuple[str, int],
    state: str,
    lease_seconds: float,
) -> None:
    """Say that a worker is alive, and what it does.

    Raises:
        SupersededError: Another process has the name by now.
    """
    mine = (
        (workers.c.study_id == study_id)
        & (workers.c.worker_id == worker[0])
        & (workers.c.generation == worker[1])
    )
    values = {
        "state": state,
        "heartbeat_at": now(connection),
        "lease_until": now(connection) + lease_seconds,
    }
    if connection.execute(sa.update(workers).where(mine).values(values)).rowcount != 1:
        raise SupersededError(f"another process works as {worker[0]} now")


def is_superseded(connection: Connection, study_id: int, worker: tuple[str, int]) -> bool:
    """Whether another process has the worker's name by now."""
    mine = {"of_study": study_id, "of_worker": worker[0]}
    return connection.execute(generation(), mine).scalar() not in (None, worker[1])


def listed(connection: Connection, study_id: int) -> list[dict[str, Any]]:
    """Every worker the study ever had, with what it is doing and its silence in seconds."""
    at = read_now(connection)
    held = sa.select(attempts).where(attempts.c.study_id == study_id, HELD)
    trials = {(r.worker_id, r.generation): r for r in connection.execute(held)}
    own = sa.select(workers).where(workers.c.study_id == study_id).order_by(workers.c.worker_id)
    found = []
    for row in connection.execute(own):
        attempt = trials.get((row.worker_id, row.generation))
        state = "lost" if row.state not in GONE and row.lease_until < at else row.state
        found.append(
            row._asdict()
            | {
                "facts": json.loads(row.facts or "{}"),
                "state": "training" if state == "idle" and attempt else state,
                "silent": max(0.0, at - row.heartbeat_at),
                "trial_id": attempt.trial_id if attempt else None,
                "epoch": attempt.epoch if attempt else None,
                "speed": attempt.speed if attempt else None,
            }
        )
    return found


def order(connection: Connection, study_id: int, limits: Limits) -> Order:
    """What the study's workers are told; a limit that is exceeded becomes an order to stop."""
    row = connection.execute(standing(), {"of_study": study_id}).first()
    if row is None:
        return Order("run")
    if row.state == "run" and limits != Limits():
        at = read_now(connection)
        held = (attempts.c.study_id == study_id) & HELD
        running = sa.select(sa.func.coalesce(sa.func.sum(attempts.c.seconds), 0.0)).where(held)
        reason = exceeded(row, connection.execute(running).scalar_one(), at, limits)
        if reason is not None:
            return give_order(connection, study_id, "stop", reason, unless_given=True)
    return Order(row.state, row.reason, row.detail)


def exceeded(row: Row[Any], running: float, at: float, limits: Limits) -> str | None:
    """Which limit stops a study at a time whose attempts have so many seconds ``running``."""
    if row.state != "run":
        return None
    return limits.exceeded(row.spent + running, at - (row.started_at or at))


def give_order(
    connection: Connection,
    study_id: int,
    state: str,
    reason: str | None,
    detail: str | None = None,
    *,
    unless_given: bool = False,
) -> Order:
    """Tell the whole fleet; ``unless_given`` leaves an order to stop or pause as it is."""
    own = controls.c.study_id == study_id
    if unless_given:
        own &= controls.c.state == "run"
    values = {"state": state, "reason": reason, "detail": detail, "changed_at": now(connection)}
    connection.execute(sa.update(controls).where(own).values(values))
    row = connection.execute(sa.select(controls).where(controls.c.study_id == study_id)).one()
    return Order(row.state, row.reason, row.detail)


def prepare(connection: Connection, study_id: int) -> None:
    """Make the study's row of controls, once; concurrent callers are told apart by its lock."""
    _optuna.lock(connection, study_id)
    known = sa.select(controls.c.study_id).where(controls.c.study_id == study_id)
    if connection.execute(known).first() is None:
        values = {"study_id": study_id, "state": "run", "spent": 0.0}
        connection.execute(sa.insert(controls).values(**values, changed_at=now(connection)))
