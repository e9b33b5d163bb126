"""The confirm rung: which recipes are trained again with fresh seeds, and how they stand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from optuna.trial import FrozenTrial, TrialState

from tuner.ladder import HasAttributes, is_judged
from tuner.metrics import METRICS
from tuner.plain import is_plain
from tuner.planned import at
from tuner.seeding import derive_seed
from tuner.statistics import RepeatedDifference, repeated_difference

if TYPE_CHECKING:
    from tuner.session import Session

Role = Literal["recipe", "plain", "tuned"]
SEEDS = 2**31
ROLE_NAMES = {"plain": "plain cross-entropy", "tuned": "plain cross-entropy, tuned"}


@dataclass(frozen=True)
class Standing:
    """A recipe at the confirm rung: its ``trial`` of the search, and its trainings by seed.

    ``role`` is ``plain`` for plain cross-entropy with its defaults, ``tuned`` for the best plain
    cross-entropy that the search found, else ``recipe``. ``runs`` are the trainings that came to
    their end, by the index of their seed; ``ended`` are the indices of those that failed too.
    """

    trial: FrozenTrial
    role: Role
    runs: Mapping[int, FrozenTrial]
    ended: frozenset[int]

    def up_to(self, seeds: int) -> Standing:
        """How it stood when it was trained with so many seeds."""
        runs = {index: run for index, run in self.runs.items() if index < seeds}
        return replace(self, runs=runs, ended=frozenset(i for i in self.ended if i < seeds))

    def metric(self, name: str, *, adjusted: bool) -> dict[int, float]:
        """A metric by the index of the seed, where it could be estimated."""
        kind = "adjusted" if adjusted else "raw"
        found = {index: run.user_attrs["metrics"][kind][name] for index, run in self.runs.items()}
        return {index: value for index, value in found.items() if value is not None}

    def objective(self) -> dict[int, float]:
        """The objective by the index of the seed."""
        return {index: run.values[0] for index, run in self.runs.items()}

    @property
    def evidence(self) -> list[FrozenTrial]:
        """All trainings of the recipe, that of the search among them, to choose by."""
        return [self.trial, *self.runs.values()]


def contenders(session: Session) -> dict[int, Role]:
    """Trials of the search that are to be trained again, by number, as far as it got.

    They are plain cross-entropy, the best trial with its loss and sampler otherwise tuned, and
    the best of the other recipes.
    """
    baseline, most = session.baseline(), session.file.ladder.confirm.recipes
    seen = set() if baseline is None else {baseline.user_attrs["digest"]}
    found: dict[int, Role] = {} if baseline is None else {baseline.number: "plain"}
    tuned, others = False, list[int]()
    for trial in session.ended().complete.trials:
        digest = trial.user_attrs["digest"]
        if digest in seen:
            continue
        seen.add(digest)
        if not tuned and is_plain(trial):
            tuned, found[trial.number] = True, "tuned"
        elif len(others) < most:
            others.append(trial.number)
        if tuned and len(others) == most:
            break
    return found | dict.fromkeys(others, "recipe")


def tuned_with(session: Session) -> tuple[int, int]:
    """Trials of the full rung that trained plain cross-entropy, and all of them, so far."""
    ended = [t for t in at(session, "full") if t.state.is_finished()]
    return sum(map(is_plain, ended)), len(ended)


def fresh_seed(session: Session, index: int) -> int:
    """The seed of the trainings with this index; all recipes share it."""
    return derive_seed(session.file.search.seed, "confirm", index) % SEEDS


def fold_of(trial: HasAttributes) -> int | None:
    """Which other validation images a trial is judged on; None for those of the search."""
    return trial.user_attrs.get("fold")


def standings(session: Session) -> list[Standing]:
    """How the recipes stand at the confirm rung, the best first; with fewer seeds comes later.

    See ``ranked``.
    """
    found = entrants(session)
    return ranked(session, found, plain_of(found))


def entrants(session: Session) -> list[Standing]:
    """The recipes of the confirm rung, each with its trainings so far."""
    roles = contenders(session)
    trials = {trial.number: trial for trial in session.trials(TrialState.COMPLETE)}
    runs: dict[int, list[FrozenTrial]] = {number: [] for number in roles}
    for trial in session.trials():
        runs.get(trial.user_attrs.get("confirms", -1), []).append(trial)
    return [
        _standing(trials[number], role, filter(lambda t: t.state.is_finished(), runs[number]))
        for number, role in roles.items()
    ]


def ranked(session: Session, found: Iterable[Standing], plain: Standing | None) -> list[Standing]:
    """Recipes in order, the best first; those that were trained with fewer seeds come later.

    Recipes whose mean keeps the floor come first, by the mean of their objective; then those that
    break it, by how far they do. The mean is over the trainings of the rung and that of the
    search: all are as sure, and that a recipe was picked by one of them makes the mean no worse
    a guide to which is best. It does make it too high, so it is never reported.
    """
    return sorted(found, key=lambda each: _order(session, each, plain))


def plain_of(found: Iterable[Standing]) -> Standing | None:
    """Plain cross-entropy with its defaults among them."""
    return next((each for each in found if each.role == "plain"), None)


def _standing(trial: FrozenTrial, role: Role, ended: Iterable[FrozenTrial]) -> Standing:
    of_rung = list(ended)
    judged = {t.user_attrs["fold"]: t for t in of_rung if is_judged(t)}
    return Standing(trial, role, judged, frozenset(t.user_attrs["fold"] for t in of_rung))


def _order(session: Session, each: Standing, plain: Standing | None) -> tuple[Any, ...]:
    objective = session.file.objective
    breach = mean_breach(session, each, plain)
    sign = -1 if METRICS[objective.metric] == "maximize" else 1
    kind = "adjusted" if objective.adjusted else "raw"
    balanced = [t.user_attrs["metrics"][kind]["balanced_accuracy"] or 0.0 for t in each.evidence]
    rank = sign * fmean(t.values[0] for t in each.evidence) if breach <= 0 else breach
    return (-len(each.runs), breach > 0, rank, -fmean(balanced), each.trial.number)


def mean_breach(session: Session, each: Standing, plain: Standing | None) -> float:
    """How far a recipe is below the floor, on average over its trainings (<= 0: it is kept).

    The floor of a training is that of plain cross-entropy with the same seed.
    """
    beside = {} if plain is None else plain.runs
    breaches = [session.floor_violation(each.trial.user_attrs["metrics"])]
    for index, run in each.runs.items():
        other = beside[index].user_attrs["metrics"] if index in beside else None
        breaches.append(session.floor_violation(run.user_attrs["metrics"], other))
    known = [breach for breach in breaches if breach is not None]
    return fmean(known) if known else 0.0


def against(
    session: Session, one: Standing, other: Standing, *, names: Sequence[str]
) -> dict[str, RepeatedDifference]:
    """Metrics of one recipe less those of the other, paired by seed, where both have several."""
    adjusted = session.file.objective.adjusted
    found = {}
    for name in names:
        a, b = (each.metric(name, adjusted=adjusted) for each in (one, other))
        pairs = [a[index] - b[index] for index in sorted(a.keys() & b.keys())]
        if len(pairs) > 1:
            found[name] = repeated_difference(
                pairs,
                _ratio(session, name),
                maximize=METRICS[name] == "maximize",
                largest=math.inf if name == "nll" else 1.0,
            )
    return found


def _ratio(session: Session, name: str) -> float:
    """Validation images per training image, on average over the classes that a metric counts."""
    attrs = session.study.user_attrs
    training, validation = attrs["class_counts"], attrs["validation_counts"]
    members = attrs["groups"].get(name.removesuffix("_accuracy"), range(len(training)))
    return fmean(validation[c] / training[c] for c in members if training[c])
