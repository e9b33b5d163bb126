"""The confirm rung: the best recipes again with fresh seeds, and which of them is the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

from optuna.trial import FrozenTrial, TrialState

from tuner.climbing import Ticket
from tuner.ladder import HasAttributes, is_judged
from tuner.metrics import METRICS
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
    their end, by the index of their seed; ``ended`` counts those that failed too.
    """

    trial: FrozenTrial
    role: Role
    runs: Mapping[int, FrozenTrial]
    ended: int

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
    baseline, distinct = session.baseline(), dict[str, FrozenTrial]()
    for trial in session.ranked(session.trials(TrialState.COMPLETE)):
        distinct.setdefault(trial.user_attrs["digest"], trial)
    found: dict[int, Role] = {} if baseline is None else {baseline.number: "plain"}
    others = [t for t in distinct.values() if not _copies(t, baseline)]
    tuned = next(filter(_is_plain, others), None)
    if tuned is not None:
        found[tuned.number] = "tuned"
    rest = [trial.number for trial in others if trial is not tuned]
    return found | dict.fromkeys(rest[: session.file.ladder.confirm.recipes], "recipe")


def _copies(trial: FrozenTrial, other: FrozenTrial | None) -> bool:
    return other is not None and trial.user_attrs["digest"] == other.user_attrs["digest"]


def _is_plain(trial: FrozenTrial) -> bool:
    attrs = trial.user_attrs
    return bool(attrs["loss"] == "cross_entropy" and attrs["sampler"] == "natural")


def confirming(session: Session) -> Iterator[Ticket]:
    """The rung's tickets, seed by seed, so that all recipes have as many of them at any time."""
    numbers = sorted(contenders(session))
    trials = {trial.number: trial for trial in session.trials(TrialState.COMPLETE)}
    for index in range(session.file.ladder.confirm.seeds):
        for number in numbers:
            attrs = {"fidelity": "confirm", "confirms": number, "fold": index}
            yield trials[number].params, attrs


def fresh_seed(session: Session, index: int) -> int:
    """The seed of the trainings with this index; all recipes share it."""
    return derive_seed(session.file.search.seed, "confirm", index) % SEEDS


def fold_of(trial: HasAttributes) -> int | None:
    """Which other validation images a trial is judged on; None for those of the search."""
    return trial.user_attrs.get("fold")


def standings(session: Session) -> list[Standing]:
    """How the recipes stand at the confirm rung, the best first; those without all seeds last.

    Recipes whose mean keeps the floor come first, by the mean of their objective; then those that
    break it, by how far they do. The mean is over the trainings of the rung and that of the
    search: all are as sure, and that a recipe was picked by one of them makes the mean no worse
    a guide to which is best. It does make it too high, so it is never reported.
    """
    roles = contenders(session)
    trials = {trial.number: trial for trial in session.trials(TrialState.COMPLETE)}
    runs: dict[int, list[FrozenTrial]] = {number: [] for number in roles}
    for trial in session.trials():
        runs.get(trial.user_attrs.get("confirms", -1), []).append(trial)
    found = [
        _standing(trials[number], role, filter(lambda t: t.state.is_finished(), runs[number]))
        for number, role in roles.items()
    ]
    plain = plain_of(found)
    return sorted(found, key=lambda each: _order(session, each, plain))


def plain_of(found: Iterable[Standing]) -> Standing | None:
    """Plain cross-entropy with its defaults among them."""
    return next((each for each in found if each.role == "plain"), None)


def _standing(trial: FrozenTrial, role: Role, ended: Iterable[FrozenTrial]) -> Standing:
    of_rung = list(ended)
    judged = {t.user_attrs["fold"]: t for t in of_rung if is_judged(t)}
    return Standing(trial, role, judged, len({t.user_attrs["fold"] for t in of_rung}))


def _order(session: Session, each: Standing, plain: Standing | None) -> tuple[Any, ...]:
    objective, missing = session.file.objective, len(each.runs) < session.file.ladder.confirm.seeds
    breach = mean_breach(session, each, plain)
    sign = -1 if METRICS[objective.metric] == "maximize" else 1
    kind = "adjusted" if objective.adjusted else "raw"
    balanced = [t.user_attrs["metrics"][kind]["balanced_accuracy"] or 0.0 for t in each.evidence]
    rank = sign * fmean(t.values[0] for t in each.evidence) if breach <= 0 else breach
    return (missing, breach > 0, rank, -fmean(balanced), each.trial.number)


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


def is_decided(session: Session) -> bool:
    """Whether the rung is over: all recipes were trained with all seeds, or failed to."""
    return session.file.ladder.confirms and _all_ended(session, standings(session))


def _all_ended(session: Session, found: Sequence[Standing]) -> bool:
    seeds = session.file.ladder.confirm.seeds
    return bool(found) and all(each.ended >= seeds for each in found)


def winner(session: Session) -> FrozenTrial | None:
    """The trial of the search whose recipe the rung confirmed as the best; None until it is over.

    A recipe that failed with one of the seeds is not the answer; None too when all did.
    """
    found = standings(session) if session.file.ladder.confirms else []
    if not _all_ended(session, found):
        return None
    first = found[0]
    return first.trial if len(first.runs) == session.file.ladder.confirm.seeds else None


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
            maximize = METRICS[name] == "maximize"
            found[name] = repeated_difference(pairs, _ratio(session, name), maximize=maximize)
    return found


def _ratio(session: Session, name: str) -> float:
    """Validation images per training image, on average over the classes that a metric counts."""
    attrs = session.study.user_attrs
    training, validation = attrs["class_counts"], attrs["validation_counts"]
    members = attrs["groups"].get(name.removesuffix("_accuracy"), range(len(training)))
    return fmean(validation[c] / training[c] for c in members if training[c])


def confirm_lines(session: Session) -> list[str]:
    """How far the rung is, and what it says of its best recipe once it is over."""
    own = [t for t in session.trials() if "confirms" in t.user_attrs]
    own = [t for t in own if "retry_of" not in t.user_attrs]
    planned = len(own) or session.file.ladder.trials("confirm", 0)
    ended = sum(t.state.is_finished() for t in own)
    lines = [f"confirm {ended} of {'' if own else 'at most '}{planned} trials"]
    if winner(session) is not None:
        first = standings(session)[0]
        values = list(first.objective().values())
        fresh = f"{fmean(values):.4f} ± {stdev(values):.4f}"
        lines.append(
            f"trial {first.trial.number}: {fresh} with {len(values)} fresh seeds, "
            f"{first.trial.values[0]:.4f} in the search"
        )
    return lines
