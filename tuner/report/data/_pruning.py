"""What pruning saved, and what the trials it was told to spare say about its price."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from tuner.ladder import rung_of
from tuner.metrics import METRICS
from tuner.report.data._moment import (
    State,
    better,
    number,
    places,
    rung_shown,
    searched,
    state_of,
    still,
    value_of,
)

if TYPE_CHECKING:
    from tuner.session import Session

JUDGED = ("behind", "chance")
"""Reasons that are a judgement of the pruner; a loss that is not finite ends a trial anyway."""


@dataclass(frozen=True)
class Training:
    """How far a trial was trained, in epochs, of how many planned.

    ``place`` is its place among the trials of the last rung. Of a trial that branched from
    another's stage one, neither counts the epochs of that.
    """

    number: int
    place: int
    state: State
    trained: int
    planned: int
    reason: str | None


@dataclass(frozen=True)
class Control:
    """Trials that pruning would have ended and that were trained on to measure its price.

    ``above_median_pruned`` and ``above_best_pruned`` count those that ended better than the
    median and the best of the pruned trials' last values (None when none was pruned).
    ``regret`` is what pruning them would have cost the study: how much better the best of them
    is than the best of all others, 0 when it is not; None when there is nothing to compare.
    """

    flagged: int
    above_median_pruned: int | None
    above_best_pruned: int | None
    regret: float | None


@dataclass(frozen=True)
class PruningData:
    """Epochs trained, and the epochs there would have been without pruning.

    ``seconds_saved`` takes each pruned trial's own time per epoch; None when none is known.
    ``duplicate_epochs`` were not trained because the same recipe's result was known. ``rung``
    is the last one of a study with a ladder: only its trials are here.
    """

    trials: tuple[Training, ...]
    trained: int
    unpruned: int
    seconds_saved: float | None
    reasons: dict[str, int]
    duplicates: int
    duplicate_epochs: int
    control: Control
    rung: str | None


def pruning_data(session: Session) -> PruningData:
    """Add up the epochs of the last rung's trials, and look at the control group.

    The head rung trains no epochs and prunes nothing.
    """
    session = still(session)
    place = places(session)
    trials = [trial for trial in searched(session) if rung_of(trial) != "head"]
    rows = [_training(trial, place(trial.number)) for trial in trials]
    pruned = [(t, row) for t, row in zip(trials, rows, strict=True) if row.reason in JUDGED]
    seconds = [s for t, row in pruned if (s := _seconds_saved(t, row)) is not None]
    trained = sum(row.trained for row in rows)
    duplicates = [row for row in rows if row.state == "duplicate"]
    return PruningData(
        trials=tuple(rows),
        trained=trained,
        unpruned=trained + sum(row.planned - row.trained for _, row in pruned),
        seconds_saved=sum(seconds) if seconds else None,
        reasons=dict(Counter(row.reason for row in rows if row.reason)),
        duplicates=len(duplicates),
        duplicate_epochs=sum(row.planned for row in duplicates),
        control=_control(session, [trial for trial, _ in pruned]),
        rung=rung_shown(session),
    )


def _training(trial: FrozenTrial, place: int) -> Training:
    state = state_of(trial)
    attrs, steps = trial.user_attrs, trial.intermediate_values
    planned, reason = int(attrs["epochs"]), attrs.get("reason")
    if state == "duplicate" or not steps:
        return Training(trial.number, place, state, 0, planned, reason)
    first, end = min(steps), max(steps) + 1
    return Training(trial.number, place, state, end - first, planned - first, reason)


def _seconds_saved(trial: FrozenTrial, row: Training) -> float | None:
    seconds = number(trial.user_attrs.get("seconds"))
    if seconds is None or row.trained == 0:
        return None
    return seconds / row.trained * (row.planned - row.trained)


def _control(session: Session, pruned: Sequence[FrozenTrial]) -> Control:
    metric = session.file.objective.metric
    complete = [t for t in session.trials() if state_of(t) == "complete"]
    flagged = [t for t in complete if t.user_attrs.get("would_prune_at") is not None]
    others = [t for t in complete if t.user_attrs.get("would_prune_at") is None]
    ends, given_up = _values(flagged), _values(pruned)
    best = _best(metric, given_up)
    return Control(
        flagged=len(flagged),
        above_median_pruned=_count_above(metric, ends, median(given_up) if given_up else None),
        above_best_pruned=_count_above(metric, ends, best),
        regret=_regret(
            metric, *(_values(filter(session.keeps_floor, t)) for t in (flagged, others))
        ),
    )


def _values(trials: Iterable[FrozenTrial]) -> list[float]:
    return [v for trial in trials if (v := value_of(trial)) is not None]


def _count_above(metric: str, values: Sequence[float], bar: float | None) -> int | None:
    return None if bar is None else sum(better(metric, value, bar) for value in values)


def _best(metric: str, values: Sequence[float]) -> float | None:
    if not values:
        return None
    return max(values) if METRICS[metric] == "maximize" else min(values)


def _regret(metric: str, flagged: Sequence[float], others: Sequence[float]) -> float | None:
    ours, theirs = _best(metric, flagged), _best(metric, others)
    if ours is None or theirs is None:
        return None
    return abs(ours - theirs) if better(metric, ours, theirs) else 0.0
