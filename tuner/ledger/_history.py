"""The trials of a study as one process knows them: those that ended are read once."""

from __future__ import annotations

import time
from bisect import bisect, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import attrgetter
from typing import Any

import sqlalchemy as sa
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import Connection

from tuner.ledger import _frozen
from tuner.ledger._optuna import FINISHED, TRIALS

UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
by_number = attrgetter("number")


@dataclass(frozen=True)
class News:
    """Ids of trials that ended beyond the mark, and of the ``first`` one that has not.

    ``at`` says when that was, by this process's monotonic clock.
    """

    ended: Sequence[int]
    first: int | None
    at: float = field(default_factory=time.monotonic)


class History:
    """Trials of one study, read piece by piece.

    Reading again costs what is new and what ended since, not what ended before: a trial that
    ended never changes.
    """

    def __init__(self, study_id: int) -> None:
        self.study_id = study_id
        self.known: dict[int, FrozenTrial] = {}
        # All trials up to this id ended and are known. They become visible in the order of ids.
        self.mark = 0
        # What a write was told besides; not taken in yet.
        self.news: News | None = None
        self._ids: list[int] = []
        self._lists: dict[tuple[TrialState, ...], list[FrozenTrial]] = {}

    def read_ended(self, connection: Connection) -> None:
        """Take in the trials that ended since the last time."""
        where = {"study": self.study_id, "mark": self.mark}
        rows = connection.execute(_ended(), where).all()
        first = rows[0].first if rows else None
        self.take_in(connection, News([row.trial_id for row in rows], first))

    def take_in(self, connection: Connection, news: News) -> None:
        """Read the trials that ended and are not known."""
        new = self.lacking(news)
        self.add(_frozen.read(connection, new))
        if news.ended:
            last = max(news.ended) if news.first is None else news.first - 1
            self.mark = max(self.mark, last)

    def lacking(self, news: News) -> list[int]:
        """Ids of trials that ended and are not known."""
        return sorted(trial_id for trial_id in news.ended if trial_id not in self.known)

    def add(self, trials: Iterable[FrozenTrial]) -> None:
        """Take in trials that ended and were not known."""
        for trial in trials:
            self.known[trial._trial_id] = trial
            insort(self._ids, trial._trial_id)
            for states, found in self._lists.items():
                if trial.state in states:
                    insort(found, trial, key=by_number)

    def beyond(self, mark: int) -> list[int]:
        """Ids, in order, of the known trials after ``mark``."""
        return self._ids[bisect(self._ids, mark) :]

    def known_in(self, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """Ended trials in any of the states by number; sorted once, then kept up to date."""
        if states not in self._lists:
            found = (trial for trial in self.known.values() if trial.state in states)
            self._lists[states] = sorted(found, key=by_number)
        return self._lists[states].copy()

    def ended_after(
        self, mark: int, have: Iterable[int], most: int
    ) -> tuple[list[FrozenTrial], int]:
        """What somebody lacks who knows all trials up to ``mark``, and those it ``have``s.

        Returns:
            At most ``most`` trials, and how far it knows all of them once it has these.
        """
        known = set(have)
        lacking = [i for i in self.beyond(mark) if i not in known]
        page = lacking[:most]
        whole = len(page) == len(lacking)
        return [self.known[i] for i in page], self.mark if whole else min(page[-1], self.mark)

    def unfinished(self, connection: Connection, states: Iterable[TrialState]) -> list[FrozenTrial]:
        """Trials that wait or run at this moment."""
        wanted = tuple(states)
        where = {"study": self.study_id, "mark": self.mark, "states": wanted}
        ids = connection.execute(_open(), where).scalars().all()
        return [trial for trial in _frozen.read(connection, ids) if trial.state in wanted]

    def trials(
        self, connection: Connection, states: tuple[TrialState, ...] | None
    ) -> list[FrozenTrial]:
        """Trials in any of ``states``, or all, by number."""
        wanted = tuple(TrialState) if states is None else states
        open_ = [state for state in wanted if state in UNFINISHED]
        # What ends between the two reads is in both of them, and never in none.
        rest = self.unfinished(connection, open_) if open_ else []
        self.read_ended(connection)
        found = self.known_in(tuple(state for state in wanted if state in FINISHED))
        if not rest:
            return found
        found += [trial for trial in rest if trial._trial_id not in self.known]
        return sorted(found, key=by_number)


def _own() -> sa.ColumnElement[bool]:
    after = TRIALS.c.trial_id > sa.bindparam("mark", type_=sa.Integer)
    return (TRIALS.c.study_id == sa.bindparam("study", type_=sa.Integer)) & after


def _is_one_of(states: Iterable[TrialState]) -> sa.ColumnElement[bool]:
    """Whether a trial has one of the states; not ``IN``, whose text is made at each execution."""
    return sa.or_(*(TRIALS.c.state == state for state in states))


@cache
def _ended() -> sa.Select[Any]:
    """Ids of ended trials beyond the mark, each beside that of the first one that has not ended.

    One statement, so that nothing ends between the two.
    """
    columns = sa.select(TRIALS.c.trial_id, first_open().scalar_subquery().label("first"))
    return columns.where(_own(), _is_one_of(FINISHED)).order_by(TRIALS.c.trial_id)


def first_open() -> sa.Select[Any]:
    """Id of the first trial beyond the mark that has not ended."""
    return sa.select(sa.func.min(TRIALS.c.trial_id)).where(_own(), _is_one_of(UNFINISHED))


def ended_beyond() -> sa.Select[Any]:
    """Ids of ended trials beyond the mark in one value, for PostgreSQL; NULL: there are none."""
    return sa.select(sa.func.array_agg(TRIALS.c.trial_id)).where(_own(), _is_one_of(FINISHED))


@cache
def _open() -> sa.Select[Any]:
    wanted = TRIALS.c.state.in_(sa.bindparam("states", expanding=True))
    return sa.select(TRIALS.c.trial_id).where(_own(), wanted).order_by(TRIALS.c.trial_id)
