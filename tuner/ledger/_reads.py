"""What is read of a study's ledger, and how: each read is tried again when it can be."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Connection, Engine

from tuner.engines import PATIENCE, insist, reading
from tuner.ledger import _fleet, _frozen
from tuner.ledger._changes import Limits, Order
from tuner.ledger._history import History
from tuner.ledger._schema import newest, version
from tuner.ledger._tables import attempts, epochs, workers

T = TypeVar("T")

LEASE_SECONDS = 60.0
IDLE_SECONDS = 5.0
NEWS_SECONDS = 0.5


class Reads:
    """Reads of one study, each a transaction; many threads may use it."""

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

    def __reduce__(self) -> Any:
        raise TypeError("a ledger is not pickled: it holds a way into the database; open it anew")

    def _read(self, action: Callable[[Connection], T], patience: float = PATIENCE) -> T:
        def once() -> T:
            with self.engine.connect().execution_options(**reading(self.engine)) as connection:
                return action(connection)

        self._used = time.monotonic()
        return insist(once, patience=min(patience, self.patience))

    def rest(self) -> None:
        """Give idle connections back: a server has few, and epochs may be long."""
        if self.engine.dialect.name != "sqlite" and self._used < time.monotonic() - IDLE_SECONDS:
            self.engine.dispose()

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

    def trials(self, states: tuple[TrialState, ...] | None = None) -> list[FrozenTrial]:
        """Trials in any of the states, or all, by number; do not change them."""
        with self._reading:
            return self._read(lambda c: self.history.trials(c, states))

    def ended(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """Trials that ended in any of the states, by number; do not change them.

        A write just before may have said which ended: what is known of them is not read again.
        """
        with self._reading:
            news = self.history.news
            if news is None or news.at < time.monotonic() - NEWS_SECONDS:
                return self._read(lambda c: self.history.trials(c, states))
            if self.history.lacking(news):
                self._read(lambda c: self.history.take_in(c, news))
            return self.history.known_in(states)

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

    def by_ids(self, trial_ids: Sequence[int]) -> list[FrozenTrial]:
        """Trials as they are in the database now, read together, by id."""
        return self._read(lambda c: _frozen.read(c, trial_ids))

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
