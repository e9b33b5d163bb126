"""What the algorithm learns from when it proposes for a rung: its trials, and of the rung below."""

from __future__ import annotations

import copy

import numpy as np
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from tuner.climbing import compared
from tuner.ended import by_number
from tuner.ladder import Rung, is_judged, rung_of
from tuner.ledger import View
from tuner.plain import is_plain
from tuner.planned import at
from tuner.search import STARTUP_TRIALS, algorithm, cohort_tpe
from tuner.seeding import derive_seed
from tuner.session import Session

MOST: dict[Rung, int] = {"head": 300, "deferred": 1000, "full": 1000, "confirm": 0}
"""Of how many ended trials a proposal learns; at the head rung trials are short, and so must it be.

A study without a ladder that has no more of them is plain Optuna.
"""
BEST_SHARE = 0.25
PRIOR_BEST, PRIOR_DRAWN = 12, 96
"""Trials of the rung below that are a prior at most: the best, and of those drawn at random."""
BLIND = 3
"""At the head rung every third proposal is drawn at random: many are made before any is judged."""


def proposing(
    session: Session, rung: Rung, number: int, *, plain: bool = False, unseen: bool = False
) -> Study:
    """The study as the algorithm sees it that proposes trial ``number`` of a rung.

    A study that is searched at one rung is seen whole, up to a size. At the head rung many
    proposals learn from the same trials, until ``forget`` is called. Who tunes ``plain``
    cross-entropy learns from its trials alone once there are enough of them. The first that try
    what is ``unseen`` below are drawn at random: all trials before have one value there, and away
    from it TPE would go, wherever that leads.
    """
    study = _study(session, rung, plain=plain)
    seed = derive_seed(session.file.search.seed, "search", number) % 2**32
    name = _algorithm(session, rung, number, unseen=unseen)
    if rung != "head":
        _forget(study)
    if rung == "head" and name == "tpe":
        study.sampler = session.samplers.setdefault(rung, cohort_tpe())
        study.sampler.seed(seed)
    else:
        study.sampler = algorithm(name, seed)
    return study


def _algorithm(session: Session, rung: Rung, number: int, *, unseen: bool) -> str:
    """The study's own, or ``random`` where nothing is left open or nothing is known."""
    name = session.file.search.algorithm
    if rung == "head" and name == "gp":
        # A proposal of a Gaussian process takes a hundred times as long as a trial of this rung.
        name = "tpe"
    blind = rung == "head" and name == "tpe" and is_blind(number)
    early = unseen and _unseen_before(session, rung, number) < STARTUP_TRIALS
    return "random" if rung == "confirm" or blind or early else name


def _unseen_before(session: Session, rung: Rung, number: int) -> int:
    return sum("unseen" in t.user_attrs and t.number < number for t in at(session, rung))


def is_blind(number: int) -> bool:
    """Whether the trial with this number is drawn at random at the head rung."""
    return number % BLIND == 0


def forget(session: Session, rung: Rung) -> None:
    """Read the trials again before the next proposal."""
    _forget(_study(session, rung))
    session.samplers.pop(rung, None)


def _forget(study: Study) -> None:
    study._thread_local.cached_all_trials = None


def _study(session: Session, rung: Rung, *, plain: bool = False) -> Study:
    if session.file.ladder.rungs == ("full",) and len(session.ended().known) <= MOST[rung]:
        return session.study
    if (rung, plain) not in session.views:
        seen = session.fenced.through(_view(session, rung, plain))
        session.views[rung, plain] = Study(study_name=session.study.study_name, storage=seen)
    return session.views[rung, plain]


def _view(session: Session, rung: Rung, plain: bool) -> View:
    done: dict[int, FrozenTrial] = {}

    def view(open_: list[FrozenTrial]) -> list[FrozenTrial]:
        alone = plain and sum(map(len, _ended(session, rung, plain=True))) >= STARTUP_TRIALS
        learnt = _capped(*_ended(session, rung, plain=alone), MOST[rung])
        own = [_as_complete(trial, done) for trial in learnt]
        own += [t for t in open_ if rung_of(t) == rung and (is_plain(t) or not alone)]
        return sorted(own if alone else own + _prior(session, rung), key=by_number)

    return view


def _ended(
    session: Session, rung: Rung, *, plain: bool
) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
    """Ended trials of a rung, only those of ``plain`` cross-entropy if so: ranked, and others."""
    ended = session.ended()
    found = ended.of_rung[rung].trials, ended.apart[rung]
    return (list(filter(is_plain, found[0])), list(filter(is_plain, found[1]))) if plain else found


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


def _capped(ranked: list[FrozenTrial], apart: list[FrozenTrial], most: int) -> list[FrozenTrial]:
    """Ended trials, at most so many: the best and an even choice of the others.

    What a proposal costs grows with the trials it learns from.
    """
    everyone = len(ranked) + len(apart)
    if everyone <= most:
        return ranked + apart
    best = min(int(most * BEST_SHARE), len(ranked))
    chosen = np.linspace(best, everyone - 1, most - best).round().astype(int).tolist()
    rest = (ranked[i] if i < len(ranked) else apart[i - len(ranked)] for i in chosen)
    return ranked[:best] + list(rest)


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
    return [
        _with(trial, TrialState.COMPLETE, float(slope * trial.values[0] + offset))
        for trial in _told(session.ended().of_rung[below].trials, below)
    ]


def _told(ranked: list[FrozenTrial], rung: Rung) -> list[FrozenTrial]:
    """Trials of a rung, the best first, that say enough of it: the best, and a fair sample.

    TPE divides how dense the good trials are by how dense the others are. The algorithm drew
    most trials where it is good, so that the others have to be those drawn at random: else
    what it left alone, because it is bad, looks as if nobody had tried it.
    """
    best, rest = ranked[:PRIOR_BEST], ranked[PRIOR_BEST:]
    drawn = [t for t in rest if is_blind(t.number)] if rung == "head" else rest
    chosen = np.linspace(0, len(drawn) - 1, min(PRIOR_DRAWN, len(drawn))).round().astype(int)
    return best + [drawn[i] for i in chosen.tolist()]
