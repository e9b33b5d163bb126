"""The ledger of one study: who works on which trial, and what may be written about it."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Connection, Engine

from tuner.engines import PATIENCE, insist, reading
from tuner.ledger import _fleet, _frozen, _optuna, _queue, _reap
from tuner.ledger._changes import Changes, Lease, Limits, Order, SupersededError
from tuner.ledger._history import History
from tuner.ledger._schema import newest, version
from tuner.ledger._tables import attempts, epochs, workers

T = TypeVar("T")

LEASE_SECONDS = 60.0
IDLE_SECONDS = 5.0
SHORT = 2.0


class Ledger:
    """Reads and writes of one study, each a transaction that is tried again when it can be.

    Many threads may use it. A connection that was not used for a while is given back.
    """

    def __init__(
        self,
        engine: Engine,
        study_id: int,
        *,
        limits: Limits = Limits(),  # noqa: B008  (frozen)
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self.engine, self.study_id, self.limits = engine, study_id, limits
        self.lease_seconds = lease_seconds
        self.patience = PATIENCE
        self.history = History(study_id)
        self._reading = threading.Lock()
        self._used = time.monotonic()

    def prepare(self) -> None:
        """Make the study's own rows; once, before anybody works on it."""
        self._write(lambda c: _fleet.prepare(c, self.study_id))

    def __reduce__(self) -> Any:
        raise TypeError("a ledger is not pickled: it holds a way into the database; open it anew")

    def _write(self, action: Callable[[Connection], T], patience: float = PATIENCE) -> T:
        def once() -> T:
            with self.engine.begin() as connection:
                return action(connection)

        self._used = time.monotonic()
        return insist(once, patience=min(patience, self.patience))

    def _read(self, action: Callable[[Connection], T]) -> T:
        def once() -> T:
            with self.engine.connect().execution_options(**reading(self.engine)) as connection:
                return action(connection)

        self._used = time.monotonic()
        return insist(once, patience=self.patience)

    def rest(self) -> None:
        """Give idle connections back: a server has few, and epochs may be long."""
        if self.engine.dialect.name != "sqlite" and self._used < time.monotonic() - IDLE_SECONDS:
            self.engine.dispose()

    # Tickets

    def enqueue(
        self, tickets: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], expected: int
    ) -> bool:
        """Queue tickets (fixed parameters, user attributes) if the study has ``expected`` trials.

        Returns:
            False when another process queued some meanwhile: read the trials again.
        """
        return self._write(lambda c: _optuna.enqueue(c, self.study_id, tickets, expected))

    def claim(self, worker: tuple[str, int]) -> Lease | None:
        """A lease on the worker's own trial or the next ticket; None: none, or not to run.

        A worker whose name another process has taken over gets none either.
        """

        def action(connection: Connection) -> Lease | None:
            if _fleet.order(connection, self.study_id, self.limits).state != "run":
                return None
            if _fleet.is_superseded(connection, self.study_id, worker):
                return None
            mark = self.history.mark
            return _queue.claim(connection, self.study_id, worker, self.lease_seconds, mark)

        return self._write(action)

    def write(
        self, lease: Lease, changes: Changes, *, patience: float = SHORT, **progress: Any
    ) -> Order:
        """Write changes, renew the lease and hear the order, in one transaction.

        Args:
            lease: The right to do so.
            changes: What to write; cleared once it is written.
            patience: Seconds to keep trying. What could not be written stays in ``changes``.
            **progress: Columns of the attempt: ``seconds``, ``speed``, ``first_epoch``, ``note``.

        Raises:
            LeaseLostError: The trial is another worker's; nothing was written.
            sqlalchemy.exc.DBAPIError: The database did not answer in time.
        """

        def action(connection: Connection) -> Order:
            _queue.write(connection, lease, changes, self.lease_seconds, progress)
            return _fleet.order(connection, self.study_id, self.limits)

        told = self._write(action, patience)
        changes.clear()
        return told

    def finish(
        self,
        lease: Lease,
        changes: Changes,
        *,
        state: TrialState,
        values: Sequence[float] | None = None,
        end: str,
        reason: str | None = None,
        detail: str | None = None,
        patience: float = PATIENCE,
        **progress: Any,
    ) -> None:
        """End the attempt and its trial; ``WAITING`` puts the trial back into the queue.

        The same code error (``note``) on three trials in a row stops the study.

        Raises:
            LeaseLostError: The trial is another worker's; nothing was written.
        """

        def action(connection: Connection) -> None:
            _queue.finish(
                connection,
                lease,
                changes,
                state=state,
                values=values,
                end=end,
                reason=reason,
                detail=detail,
                progress=progress,
            )
            note = str(progress.get("note"))
            if reason == "code_error" and _queue.same_error(connection, self.study_id, note):
                _fleet.give_order(
                    connection, self.study_id, "stop", "code_error", detail, unless_given=True
                )

        self._write(action, patience)
        changes.clear()

    def reap(self, dead: Sequence[tuple[str, int]] = (), *, overdue: bool = True) -> list[int]:
        """Queue the trials of ``dead`` workers again, and of leases that are overdue.

        After an outage of the storage every lease is overdue, and nobody is dead: see
        ``pulse.Contact``.

        Returns:
            The numbers of the trials.
        """
        return self._write(lambda c: _reap.reap(c, self.study_id, dead, overdue=overdue), SHORT)

    # Workers and orders

    def register(self, worker_id: str, facts: dict[str, Any], *, dead: bool = False) -> int:
        """Enter a worker; its generation. See ``_fleet.register``."""
        return self._write(
            lambda c: _fleet.register(
                c, self.study_id, worker_id, facts, self.lease_seconds, dead=dead
            )
        )

    def beat(self, worker: tuple[str, int], state: str, lease: Lease | None = None) -> Order:
        """Say that a worker is alive, renew its lease if it has one, and hear the order.

        Raises:
            LeaseLostError: The lease is not the worker's any more; that it is alive is noted.
            SupersededError: Another process has the worker's name by now.
        """

        def action(connection: Connection) -> tuple[Order, bool]:
            _fleet.beat(connection, self.study_id, worker, state, self.lease_seconds)
            held = lease is None or _queue.renew(connection, lease, self.lease_seconds)
            return _fleet.order(connection, self.study_id, self.limits), held

        told, held = self._write(action, self.lease_seconds)
        if lease is not None and not held:
            raise _queue.lost(lease)
        return told

    def leave(self, worker: tuple[str, int]) -> None:
        """Say goodbye; who cannot is found to be gone."""
        with contextlib.suppress(SupersededError, sa.exc.SQLAlchemyError):
            self._write(lambda c: _fleet.beat(c, self.study_id, worker, "left", 0.0), SHORT)

    def workers(self) -> list[dict[str, Any]]:
        """Every worker the study had: see ``_fleet.listed``."""
        return self._read(lambda c: _fleet.listed(c, self.study_id))

    def running(self) -> int:
        """How many trials are being worked on."""
        held = (attempts.c.study_id == self.study_id) & attempts.c.holds.is_not(None)
        statement = sa.select(sa.func.count()).where(held)
        return int(self._read(lambda c: c.execute(statement).scalar_one()))

    def alive(self) -> list[dict[str, Any]]:
        """Rows of workers that did not say goodbye."""
        statement = sa.select(workers).where(
            workers.c.study_id == self.study_id, workers.c.state.not_in(_fleet.GONE)
        )
        return self._read(lambda c: [row._asdict() for row in c.execute(statement)])

    def ready(self) -> bool:
        """Whether the storage has Tuner's tables in this program's version; nothing is written."""
        return self._read(version) == newest()

    def standing(self) -> Order:
        """What the fleet was told last; nothing is written, unlike with ``order``."""
        return self._read(lambda c: _fleet.order(c, self.study_id, Limits()))

    def order(self) -> Order:
        """What the fleet is told at this moment; a limit that is exceeded stops it."""
        return self._write(lambda c: _fleet.order(c, self.study_id, self.limits))

    def give_order(
        self,
        state: str,
        reason: str | None = None,
        detail: str | None = None,
        *,
        unless_given: bool = False,
    ) -> Order:
        """Tell the whole fleet to ``run``, ``pause`` or ``stop``."""
        return self._write(
            lambda c: _fleet.give_order(
                c, self.study_id, state, reason, detail, unless_given=unless_given
            )
        )

    # Reading

    def trials(self, states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
        """Trials in any of the states, or all, by number; do not change them."""
        with self._reading:
            return self._read(lambda c: self.history.trials(c, states))

    def ended_after(
        self, mark: int, have: Sequence[int], most: int
    ) -> tuple[list[FrozenTrial], int]:
        """Ended trials that another process lacks: see ``History.ended_after``."""
        with self._reading:
            self._read(self.history.read_ended)
            return self.history.ended_after(mark, have, most)

    def unfinished(self, states: Sequence[TrialState]) -> list[FrozenTrial]:
        """Trials that wait or run at this moment, as ``states`` say; do not change them."""
        return self._read(lambda c: self.history.unfinished(c, states))

    def trial(self, trial_id: int) -> FrozenTrial:
        """One trial as it is in the database now."""
        if trial_id in self.history.known:
            return self.history.known[trial_id]
        return self._read(lambda c: _frozen.read(c, [trial_id])[0])

    def attempts(self, trial_id: int | None = None) -> list[dict[str, Any]]:
        """Attempts of a trial, or of all, oldest first, as columns."""
        own = attempts.c.study_id == self.study_id
        if trial_id is not None:
            own &= attempts.c.trial_id == trial_id
        statement = sa.select(attempts).where(own).order_by(attempts.c.token)
        return self._read(lambda c: [row._asdict() for row in c.execute(statement)])

    def epochs(self, trial_id: int) -> list[dict[str, Any]]:
        """The metric vector of every epoch of a trial: epoch, seconds, samples, metrics."""
        statement = sa.select(epochs).where(epochs.c.trial_id == trial_id).order_by(epochs.c.epoch)
        rows = self._read(lambda c: c.execute(statement).all())
        return [row._asdict() | {"metrics": json.loads(row.metrics)} for row in rows]
