"""How a study searched: its trials in order, per loss, and between head and tail."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from optuna.trial import FrozenTrial

from tuner.ladder import rung_of
from tuner.metrics import METRICS
from tuner.report.data._moment import (
    State,
    baseline_value,
    better,
    kind_of,
    loss_of,
    number,
    places,
    rung_shown,
    searched,
    state_of,
    still,
    summary_of,
    value_of,
)

if TYPE_CHECKING:
    from tuner.session import Session


@dataclass(frozen=True)
class Point:
    """A trial's objective: its last value, or None when there is none.

    ``place`` is its place among the trials shown. ``feasible`` is whether a complete trial
    keeps the floor; the others are not judged.
    """

    number: int
    place: int
    value: float | None
    state: State
    loss: str
    feasible: bool
    summary: str


@dataclass(frozen=True)
class HistoryData:
    """The objective of every trial, and the best one kept so far after each of them.

    ``baseline`` is plain cross-entropy without adjustment. ``rung`` is the last one of a study
    with a ladder: only its trials, and the baseline, are here.
    """

    metric: str
    points: tuple[Point, ...]
    best_so_far: tuple[float | None, ...]
    best: int | None
    baseline: float | None
    rung: str | None


@dataclass(frozen=True)
class LossRow:
    """One loss: its points, and the best and median of what was trained to the end."""

    loss: str
    points: tuple[Point, ...]
    best: float | None
    median: float | None
    complete: int
    pruned: int
    failed: int


@dataclass(frozen=True)
class LossData:
    """The objective per loss, the loss with the best trial first; duplicates count once.

    ``rung`` is the last one of a study with a ladder. A baseline that was trained at another
    is in no row.
    """

    metric: str
    rows: tuple[LossRow, ...]
    baseline: float | None
    rung: str | None


@dataclass(frozen=True)
class Tradeoff:
    """Head and tail accuracy of a complete trial; on the front, no other beats it in both."""

    number: int
    head: float
    tail: float
    loss: str
    feasible: bool
    on_front: bool
    summary: str


@dataclass(frozen=True)
class HeadTailData:
    """Head against tail accuracy; ``baseline`` (head, tail) is without adjustment."""

    adjusted: bool
    points: tuple[Tradeoff, ...]
    baseline: tuple[float, float] | None
    best: int | None


def history_data(session: Session) -> HistoryData:
    """The trials of the last rung in the order of their numbers.

    The best is that of the search; which one the confirm rung chose is another question.
    """
    session = still(session)
    metric, best = session.file.objective.metric, session.best_found()
    place = places(session)
    points = [_point(session, trial, place(trial.number)) for trial in searched(session)]
    return HistoryData(
        metric=metric,
        points=tuple(points),
        best_so_far=tuple(_running_best(metric, points)),
        best=None if best is None else best.number,
        baseline=baseline_value(session),
        rung=rung_shown(session),
    )


def loss_data(session: Session) -> LossData:
    """The trials of the last rung sorted by their loss."""
    session = still(session)
    metric, place = session.file.objective.metric, places(session)
    grouped: dict[str, list[Point]] = {}
    for trial in searched(session):
        is_of_rung = rung_of(trial) == session.file.ladder.last
        if is_of_rung and state_of(trial) != "duplicate":
            point = _point(session, trial, place(trial.number))
            grouped.setdefault(loss_of(trial), []).append(point)
    rows = [_loss_row(metric, loss, points) for loss, points in grouped.items()]
    sign = -1 if METRICS[metric] == "maximize" else 1
    rows.sort(key=lambda row: (row.best is None, sign * (row.best or 0.0)))
    return LossData(metric, tuple(rows), baseline_value(session), rung_shown(session))


def head_tail_data(session: Session) -> HeadTailData:
    """Head and tail accuracy of the complete trials, judged as the study judges them.

    Trials of rungs below the last one are never complete.
    """
    session = still(session)
    kind, best, baseline = kind_of(session), session.best(), session.baseline()
    pairs = [
        (trial, pair)
        for trial in session.trials()
        if state_of(trial) == "complete" and (pair := _head_and_tail(trial, kind))
    ]
    front = _front([pair for _, pair in pairs])
    points = [
        Tradeoff(
            trial.number,
            *pair,
            loss_of(trial),
            session.keeps_floor(trial),
            pair in front,
            summary_of(trial),
        )
        for trial, pair in pairs
    ]
    return HeadTailData(
        adjusted=kind == "adjusted",
        points=tuple(points),
        baseline=None if baseline is None else _head_and_tail(baseline, "raw"),
        best=None if best is None else best.number,
    )


def _point(session: Session, trial: FrozenTrial, place: int) -> Point:
    state = state_of(trial)
    judged = state in ("complete", "duplicate")
    feasible = not judged or session.keeps_floor(trial)
    value, loss = value_of(trial), loss_of(trial)
    return Point(trial.number, place, value, state, loss, feasible, summary_of(trial))


def _finished(points: Iterable[Point]) -> list[float]:
    states = ("complete", "duplicate")
    return [p.value for p in points if p.state in states and p.value is not None]


def _running_best(metric: str, points: Sequence[Point]) -> Iterable[float | None]:
    best: float | None = None
    for point in points:
        for value in _finished([point] if point.feasible else []):
            if best is None or better(metric, value, best):
                best = value
        yield best


def _loss_row(metric: str, loss: str, points: Sequence[Point]) -> LossRow:
    counts = {state: sum(p.state == state for p in points) for state in ("pruned", "failed")}
    values = _finished(points)
    kept = list(_running_best(metric, points))
    return LossRow(
        loss=loss,
        points=tuple(points),
        best=kept[-1] if kept else None,
        median=median(values) if values else None,
        complete=sum(p.state == "complete" for p in points),
        **counts,
    )


def _head_and_tail(trial: FrozenTrial, kind: str) -> tuple[float, float] | None:
    metrics = trial.user_attrs["metrics"][kind]
    head, tail = number(metrics.get("head_accuracy")), number(metrics.get("tail_accuracy"))
    return None if head is None or tail is None else (head, tail)


def _front(pairs: Iterable[tuple[float, float]]) -> set[tuple[float, float]]:
    """The pairs that no other pair beats: at least as good in both, better in one."""
    front: set[tuple[float, float]] = set()
    highest = float("-inf")
    for head, tail in sorted(set(pairs), reverse=True):
        if tail > highest:
            front.add((head, tail))
            highest = tail
    return front
