"""The ledger of one study: who works on which trial, and what may be written about it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.engine import Connection

from tuner.engines import PATIENCE, insist
from tuner.ledger import _cohort, _fleet, _optuna, _queue, _reap, _report
from tuner.ledger._changes import Changes, Ending, Lease, Order, SupersededError
from tuner.ledger._history import News
from tuner.ledger._reads import Reads

T = TypeVar("T")

SHORT = 2.0


class Ledger(Reads):
    """Reads and writes of one study, each a transaction that is tried again when it can be.

    Many threads may use it. A connection that was not used for a while is given back.
    """

    def prepare(self) -> None:
        """Make the study's own rows; once, before anybody works on it."""
        self._write(lambda c: _fleet.prepare(c, self.study_id))

    def _write(self, action: Callable[[Connection], T], patience: float = PATIENCE) -> T:
        def once() -> T:
            with self.engine.begin() as connection:
                return action(connection)

        self._used = time.monotonic()
        return insist(once, patience=min(patience, self.patience))

    # Tickets

    def enqueue(
        self, tickets: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], expected: int
    ) -> bool:
        """Queue tickets (fixed parameters, user attributes) if the study has ``expected`` trials.

        Returns:
            False when another process queued some meanwhile: read the trials again.
        """
        return self._write(lambda c: _optuna.enqueue(c, self.study_id, tickets, expected))

    def claim(self, worker: tuple[str, int], beside: Sequence[int] = ()) -> Lease | None:
        """A lease on the worker's own trial or the next ticket; None: none, or not to run.

        A worker whose name another process has taken over gets none either. ``beside`` are the
        tokens of leases that it knows it has.
        """

        def action(connection: Connection) -> Lease | None:
            if _fleet.order(connection, self.study_id, self.limits).state != "run":
                return None
            if _fleet.is_superseded(connection, self.study_id, worker):
                return None
            mark = self.history.mark
            known = (worker, self.lease_seconds, mark, beside)
            return _queue.claim(connection, self.study_id, *known)

        return self._write(action)

    def claim_alike(self, worker: tuple[str, int], rung: str, most: int) -> list[Lease]:
        """Leases on up to ``most`` waiting trials of a rung, beside the one the worker has."""
        return self._write(
            lambda c: _cohort.claim(
                c, self.study_id, worker, rung, most, self.lease_seconds, self.history.mark
            )
        )

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

        if self.engine.dialect.name == _report.POSTGRESQL:
            told = self._report(lease, changes, patience, progress)
        else:
            told = self._write(action, patience)
        changes.clear()
        return told

    def _report(
        self, lease: Lease, changes: Changes, patience: float, progress: dict[str, Any]
    ) -> Order:
        """``write`` as one statement, which also says what ended."""
        mark = self.history.mark
        row = self._read(
            lambda c: _report.write(c, lease, changes, self.lease_seconds, progress, mark), patience
        )
        if row is None:
            raise _queue.lost(lease)
        self.history.news = News(row.ended or (), row.first)
        if _fleet.exceeded(row, row.running, row.at, self.limits):
            return self.order()
        return Order(row.state or "run", row.reason, row.detail)

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

    def finish_all(self, endings: Sequence[Ending], *, patience: float = PATIENCE) -> list[Lease]:
        """End many trials in one transaction, as ``finish`` ends one.

        Returns:
            The leases that were lost before: nothing was written of their trials.
        """
        lost = self._write(lambda c: _cohort.finish(c, self.study_id, endings), patience)
        for ending in endings:
            if ending.lease not in lost:
                ending.changes.clear()
        return lost

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

    def beat(
        self,
        worker: tuple[str, int],
        state: str,
        lease: Lease | None = None,
        others: Sequence[Lease] = (),
    ) -> Order:
        """Say that a worker is alive, renew its lease if it has one, and hear the order.

        ``others`` are further leases it has; which of them are lost shows when they end.

        Raises:
            LeaseLostError: The lease is not the worker's any more; that it is alive is noted.
            SupersededError: Another process has the worker's name by now.
        """

        def action(connection: Connection) -> tuple[Order, bool]:
            _fleet.beat(connection, self.study_id, worker, state, self.lease_seconds)
            held = lease is None or _queue.renew(connection, lease, self.lease_seconds)
            _cohort.renew(connection, others, self.lease_seconds)
            return _fleet.order(connection, self.study_id, self.limits), held

        told, held = self._write(action, self.lease_seconds)
        if lease is not None and not held:
            raise _queue.lost(lease)
        return told

    def leave(self, worker: tuple[str, int]) -> None:
        """Say goodbye; who cannot is found to be gone."""
        with contextlib.suppress(SupersededError, sa.exc.SQLAlchemyError):
            self._write(lambda c: _fleet.beat(c, self.study_id, worker, "left", 0.0), SHORT)

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
