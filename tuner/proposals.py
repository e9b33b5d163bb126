"""What the algorithm learns from when it proposes for a rung: its trials, and of the rung below."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from tuner.climbing import compared
from tuner.ladder import Rung, is_judged, rung_of
from tuner.plain import is_plain
from tuner.search import STARTUP_TRIALS, algorithm, cohort_tpe
from tuner.seeding import derive_seed
from tuner.session import Session

MOST = 300
BEST_SHARE = 0.25
PRIOR = 48
BLIND = 3
"""At the head rung every third proposal is drawn at random: many are made before any is judged."""


def proposing(session: Session, rung: Rung, number: int, *, plain: bool = False) -> Study:
    """The study as the algorithm sees it that proposes trial ``number`` of a rung.

    A study that is searched at one rung is seen whole. At the head rung many proposals learn
    from the same trials, until ``forget`` is called. Who tunes ``plain`` cross-entropy learns
    from its trials alone once there are enough of them.
    """
    study, name = _study(session, rung, plain=plain), session.file.search.algorithm
    seed = derive_seed(session.file.search.seed, "search", number) % 2**32
    if rung != "head":
        _forget(study)
    if rung == "confirm":  # Nothing is left open there.
        study.sampler = algorithm("random", seed)
    elif rung != "head" or name != "tpe":
        study.sampler = algorithm(name, seed)
    elif number % BLIND == 0:
        study.sampler = algorithm("random", seed)
    else:
        study.sampler = session.samplers.setdefault(rung, cohort_tpe())
        study.sampler.seed(seed)
    return study


def forget(session: Session, rung: Rung) -> None:
    """Read the trials again before the next proposal."""
    _forget(_study(session, rung))
    session.samplers.pop(rung, None)


def _forget(study: Study) -> None:
    study._thread_local.cached_all_trials = None


def _study(session: Session, rung: Rung, *, plain: bool = False) -> Study:
    if session.file.ladder.rungs == ("full",):
        return session.study
    if (rung, plain) not in session.views:
        seen = session.fenced.through(_view(session, rung, plain))
        session.views[rung, plain] = Study(study_name=session.study.study_name, storage=seen)
    return session.views[rung, plain]


def _view(
    session: Session, rung: Rung, plain: bool
) -> Callable[[list[FrozenTrial]], list[FrozenTrial]]:
    done: dict[int, FrozenTrial] = {}

    def view(trials: list[FrozenTrial]) -> list[FrozenTrial]:
        own = [_as_complete(t, done) for t in trials if rung_of(t) == rung]
        alike = [trial for trial in own if is_plain(trial)] if plain else []
        if sum(trial.state.is_finished() for trial in alike) >= STARTUP_TRIALS:
            return _capped(session, alike)
        return sorted(_prior(session, rung) + _capped(session, own), key=lambda t: t.number)

    return view


def _as_complete(trial: FrozenTrial, done: dict[int, FrozenTrial]) -> FrozenTrial:
    """A trial that reached the end of its rung, as one that is complete."""
    if trial.state != TrialState.PRUNED or not is_judged(trial):
        return trial
    if trial.number not in done:
        done[trial.number] = _with(trial, TrialState.COMPLETE)
    return done[trial.number]


def _with(trial: FrozenTrial, state: TrialState, value: float | None = None) -> FrozenTrial:
    changed = copy.copy(trial)
    changed.state = state
    if value is not None:
        changed.values = [value]
    return changed


def _capped(session: Session, trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """At most ``MOST`` ended trials, the best and an even choice of the others.

    What a proposal costs grows with the trials it learns from.
    """
    judged = [t for t in trials if t.state.is_finished()]
    if len(judged) <= MOST:
        return trials
    ranked = session.ranked(judged)
    best = ranked[: int(MOST * BEST_SHARE)]
    rest = ranked[len(best) :]
    chosen = np.linspace(0, len(rest) - 1, MOST - len(best)).round().astype(int)
    open_ = [t for t in trials if not t.state.is_finished()]
    return best + [rest[i] for i in sorted(set(chosen.tolist()))] + open_


def _prior(session: Session, rung: Rung) -> list[FrozenTrial]:
    """Trials of the rung below with the value they would have at this one.

    A line through the recipes trained on both translates values; without a correlation that is
    to be trusted there is no prior.
    """
    below = session.file.ladder.below(rung)
    if below is None or rung == "confirm" or not session.file.ladder.prior:
        return []
    found = compared(session, below, rung)
    if found.correlation is None or found.is_low(session.file.ladder.trust):
        return []
    lower, upper = np.array(found.pairs, dtype=np.float64).T
    slope, offset = np.polyfit(lower, upper, 1)
    ranked = session.ranked(t for t in session.trials() if rung_of(t) == below)
    chosen = np.linspace(0, len(ranked) - 1, PRIOR).round().astype(int)
    return [
        _with(ranked[i], TrialState.COMPLETE, float(slope * ranked[i].values[0] + offset))
        for i in sorted(set(chosen.tolist()))
    ]
