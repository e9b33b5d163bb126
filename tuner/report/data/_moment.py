"""A study as it was at one moment, and what every view of it asks of a trial."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

from optuna.trial import FrozenTrial, TrialState

from tuner.ladder import rung_of
from tuner.metrics import METRICS
from tuner.session import Session

if TYPE_CHECKING:
    from optuna.study import Study

State = Literal["complete", "duplicate", "pruned", "failed", "running", "waiting"]


@dataclass(frozen=True)
class _StillStudy:
    """Stands in for a study that others are writing to."""

    trials: list[FrozenTrial]
    user_attrs: dict[str, Any]

    @cached_property
    def _complete(self) -> list[FrozenTrial]:
        return [t for t in self.trials if t.state == TrialState.COMPLETE]

    def get_trials(
        self, deepcopy: bool = False, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if states == (TrialState.COMPLETE,):
            return self._complete
        return [t for t in self.trials if states is None or t.state in states]


class _StillSession(Session):
    """A session in which nothing changes, so that what is asked of it often is found once."""

    @cached_property
    def _best(self) -> FrozenTrial | None:
        return super().best()

    @cached_property
    def _baseline(self) -> FrozenTrial | None:
        return super().baseline()

    def best(self) -> FrozenTrial | None:
        return self._best

    def baseline(self) -> FrozenTrial | None:
        return self._baseline


def still(session: Session) -> Session:
    """The session with its study read once, so that everything taken from it fits together."""
    if isinstance(session, _StillSession):
        return session
    study = _StillStudy(session.trials(), dict(session.study.user_attrs))
    return _StillSession(session.file, cast("Study", study), session.store, session.fenced)


def started(session: Session) -> list[FrozenTrial]:
    """The trials that a worker has begun, by number; ``settled`` is the last fact it notes."""
    waiting = TrialState.WAITING
    return [t for t in session.trials() if t.state != waiting and "settled" in t.user_attrs]


def is_searched(session: Session, trial: FrozenTrial) -> bool:
    """Whether a trial is of the last rung, whose trials give the answer, or the baseline.

    Those of the rungs below are no trials of this search: they were trained otherwise, and
    their values are no values of this rung. Without a ladder, every trial is searched.
    """
    is_baseline = bool(trial.user_attrs.get("baseline"))
    return is_baseline or rung_of(trial) == session.file.ladder.last


def searched(session: Session) -> list[FrozenTrial]:
    """The trials of the last rung, and the baseline, that a worker has begun."""
    return [trial for trial in started(session) if is_searched(session, trial)]


def places(session: Session) -> Callable[[int], int]:
    """A trial's place among those of the last rung, by its number; without a ladder the same."""
    others = [t.number for t in session.trials() if not is_searched(session, t)]
    return lambda number: number - bisect_left(others, number)


def rung_shown(session: Session) -> str | None:
    """The rung whose trials figures show; None where all trials are trained in full."""
    ladder = session.file.ladder
    return None if ladder.searched == ("full",) else ladder.last


def state_of(trial: FrozenTrial) -> State:
    """A trial's state; a copy of a known result is a duplicate, not one more result."""
    if trial.state == TrialState.COMPLETE:
        return "duplicate" if "duplicate_of" in trial.user_attrs else "complete"
    names: dict[TrialState, State] = {
        TrialState.PRUNED: "pruned",
        TrialState.FAIL: "failed",
        TrialState.RUNNING: "running",
    }
    return names.get(trial.state, "waiting")


def value_of(trial: FrozenTrial) -> float | None:
    """The objective at the end, or after the last epoch so far; None if there is no number."""
    if trial.state == TrialState.COMPLETE:
        return number(trial.value)
    if not trial.intermediate_values:
        return None
    return number(trial.intermediate_values[max(trial.intermediate_values)])


def number(value: Any) -> float | None:
    """``value`` as a finite float; None for everything else."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def loss_of(trial: FrozenTrial) -> str:
    """The registered name of the loss a trial was trained with."""
    return str(trial.user_attrs.get("loss", "unknown"))


def summary_of(trial: FrozenTrial) -> str:
    """What was chosen for a trial, in one line: loss, sampler and the searched values."""
    attrs = trial.user_attrs
    values = [
        f"{name.rpartition('.')[2]} {value:.3g}"
        if isinstance(value, float)
        else f"{name.rpartition('.')[2]} {value}"
        for name, value in trial.params.items()
        if "." in name
    ]
    names = [str(attrs[part]) for part in ("loss", "sampler") if part in attrs]
    return ", ".join(names + values)


def kind_of(session: Session) -> Literal["adjusted", "raw"]:
    """Which of a trial's metrics the study judges by."""
    return "adjusted" if session.file.objective.adjusted else "raw"


def baseline_value(session: Session) -> float | None:
    """The objective of plain cross-entropy as it is, without any adjustment."""
    baseline = session.baseline()
    if baseline is None:
        return None
    return number(baseline.user_attrs["metrics"]["raw"].get(session.file.objective.metric))


def better(metric: str, a: float, b: float) -> bool:
    """Whether value ``a`` of a metric is better than ``b``."""
    return a > b if METRICS[metric] == "maximize" else a < b
