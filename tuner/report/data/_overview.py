"""What a study is about: its data, its goal, its trials by state, and its best recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial

from tuner.doubts import cautions
from tuner.ladder import rung_of
from tuner.report.data._moment import is_searched, number, state_of, still

if TYPE_CHECKING:
    from tuner.session import Session


@dataclass(frozen=True)
class GroupSize:
    """A group of classes: how many, and their training images."""

    name: str
    classes: int
    images: int


@dataclass(frozen=True)
class Setting:
    """One value of a recipe; ``searched`` when the study chose it."""

    part: str
    key: str
    value: Any
    searched: bool


@dataclass(frozen=True)
class BestRecipe:
    """The best trial's recipe and the strength of logit adjustment to use it with.

    ``rung`` is the one it was trained at.
    """

    number: int
    rung: str
    value: float | None
    tau: float | None
    kappa: float | None
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class FloorData:
    """What a recipe must keep: ``bound`` is the worst value that its metric may have.

    ``plain`` is plain cross-entropy's; both are None before that is trained.
    """

    metric: str
    drop: float
    plain: float | None
    bound: float | None


@dataclass(frozen=True)
class OverviewData:
    """Facts of a study; the test part's images are None before it was looked at.

    ``states`` and ``budget`` count the trials of the last rung, and the baseline; ``below``
    those that ended at each rung below it.
    """

    name: str
    metric: str
    adjusted: bool
    floor: FloorData | None
    states: dict[str, int]
    budget: int
    last: str
    below: dict[str, int]
    classes: int
    training: int
    validation: int
    test: int | None
    imbalance_ratio: float | None
    groups: tuple[GroupSize, ...]
    warnings: tuple[str, ...]
    fingerprint: str
    version: str
    best: BestRecipe | None


def overview_data(session: Session) -> OverviewData:
    """Collect the facts of a study."""
    session = still(session)
    attrs, objective, best = session.study.user_attrs, session.file.objective, session.best()
    counts: list[int] = attrs.get("class_counts", [])
    present = [count for count in counts if count > 0]
    return OverviewData(
        name=session.file.name,
        metric=objective.metric,
        adjusted=objective.adjusted,
        floor=_floor(session),
        states=dict(Counter(state_of(t) for t in session.trials() if is_searched(session, t))),
        budget=session.file.trials() + (session.file.ladder.last != "full"),
        last=session.file.ladder.last,
        below=_below(session),
        classes=len(counts),
        training=sum(counts),
        validation=sum(attrs.get("validation_counts", [])),
        test=_test_images(attrs.get("verdict")),
        imbalance_ratio=max(present) / min(present) if present else None,
        groups=tuple(
            GroupSize(name, len(members), sum(counts[c] for c in members))
            for name, members in attrs.get("groups", {}).items()
        ),
        warnings=(*attrs.get("warnings", []), *cautions(session)),
        fingerprint=attrs.get("fingerprint", ""),
        version=attrs.get("tuner_version", ""),
        best=None if best is None else _best(session, best),
    )


def _floor(session: Session) -> FloorData | None:
    floor, baseline = session.file.objective.floor, session.baseline()
    if floor is None:
        return None
    metrics = {} if baseline is None else baseline.user_attrs["metrics"]["raw"]
    plain = number(metrics.get(floor.metric))
    bound = None if plain is None else floor.bound(plain)
    return FloorData(floor.metric, floor.drop, plain, bound)


def _below(session: Session) -> dict[str, int]:
    ended = Counter(rung_of(trial) for trial in session.trials() if trial.state.is_finished())
    return {rung: ended[rung] for rung in session.file.ladder.searched[:-1]}


def _test_images(verdict: dict[str, Any] | None) -> int | None:
    if not verdict:
        return None
    return sum(verdict["counts"]) if verdict["part"] == "test" else 0


def _best(session: Session, trial: FrozenTrial) -> BestRecipe:
    attrs = trial.user_attrs
    return BestRecipe(
        number=trial.number,
        rung=rung_of(trial),
        value=number(trial.value),
        tau=number(attrs.get("tau")) if session.file.objective.adjusted else 0.0,
        kappa=number(attrs.get("kappa")),
        settings=tuple(_settings(attrs["recipe"], trial)),
    )


def _settings(recipe: dict[str, Any], trial: FrozenTrial) -> Iterator[Setting]:
    """Values of a recipe part by part: the component's name, then its hyperparameters."""
    searched = {} if trial.user_attrs.get("baseline") else trial.params
    for part, values in recipe.items():
        if not isinstance(values, dict):
            yield Setting("training run", part, values, False)
            continue
        name = values["name"]
        yield Setting(part, "", name, part in searched)
        for key, value in values.items():
            if key != "name":
                yield Setting(part, key, value, f"{part}.{name}.{key}" in searched)
