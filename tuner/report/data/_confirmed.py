"""The recipes that were trained again with fresh seeds, and what came of them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from tuner.confirmation import passed_over
from tuner.metrics import METRICS
from tuner.report.data._answer import LEVEL, Difference
from tuner.report.data._answer import Outcome as Told
from tuner.report.data._moment import still

if TYPE_CHECKING:
    from tuner.session import Session


@dataclass(frozen=True)
class Repeated:
    """Values of one recipe by seed; ``failed`` trainings have none."""

    values: tuple[float, ...]
    failed: int = 0

    @property
    def mean(self) -> float | None:
        """Their mean."""
        return fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Their standard deviation, of two at the least."""
        return stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class ConfirmedRecipe:
    """A recipe at the confirm rung; ``search`` is what it was picked for.

    ``role`` tells plain cross-entropy, with its defaults and tuned, from other recipes. One that
    was ``dropped`` has no difference to either, and fewer ``fresh`` values than there are seeds.
    ``test`` are the values of its models on the test part, for those that were looked at there.
    """

    trial: int
    role: str
    loss: str
    sampler: str
    search: float
    fresh: Repeated
    test: Repeated | None
    keeps_floor: bool
    dropped: bool
    to_plain: Difference | None
    to_tuned: Difference | None


@dataclass(frozen=True)
class ConfirmedData:
    """The recipes that were confirmed, the best first; ``rivals`` are not told apart from it.

    Those ``passed_over`` have a better mean with every seed, but break the floor.
    ``tuned_with`` are the trials that tuned plain cross-entropy, and all of the full rung.
    """

    metric: str
    seeds: int
    other_images: bool
    adjusted: bool
    tuned_with: tuple[int, int]
    recipes: tuple[ConfirmedRecipe, ...]
    rivals: tuple[int, ...]
    passed_over: tuple[int, ...] = ()


def confirmed_data(session: Session) -> ConfirmedData | None:
    """What the confirm rung found; None before it is over, or without it."""
    session = still(session)
    found = (session.study.user_attrs.get("verdict") or {}).get("confirmed")
    if not found:
        return None
    metric = session.file.objective.metric
    test = {each["trial"]: _repeated(each["metrics"][metric]) for each in found["test"]}
    return ConfirmedData(
        metric=metric,
        seeds=found["seeds"],
        other_images=found["other_images"],
        adjusted=found["adjusted"],
        tuned_with=tuple(found["tuned_with"]),
        recipes=tuple(_recipe(row, metric, test.get(row["trial"])) for row in found["recipes"]),
        rivals=tuple(found["rivals"]),
        passed_over=tuple(passed_over(found, metric)),
    )


def _repeated(values: list[float | None]) -> Repeated:
    known = tuple(value for value in values if value is not None)
    return Repeated(known, len(values) - len(known))


def _recipe(row: dict[str, Any], metric: str, test: Repeated | None) -> ConfirmedRecipe:
    return ConfirmedRecipe(
        trial=row["trial"],
        role=row["role"],
        loss=row["loss"],
        sampler=row["sampler"],
        search=row["search"],
        fresh=_repeated(row["values"]),
        test=test,
        keeps_floor=row["keeps_floor"],
        dropped=row["dropped"],
        to_plain=_difference(metric, row["to_plain"].get(metric)),
        to_tuned=_difference(metric, row["to_tuned"].get(metric)),
    )


def _difference(metric: str, found: dict[str, float] | None) -> Difference | None:
    if found is None:
        return None
    return Difference(**found, outcome=_told(metric, found))


def _told(metric: str, found: dict[str, float]) -> Told:
    """Better where the one-sided test says so; worse where the whole interval is."""
    sign = 1 if METRICS[metric] == "maximize" else -1
    low, high = sorted((sign * found["low"], sign * found["high"]))
    if found["p_value"] < LEVEL and low > 0:
        return "better"
    return "worse" if high < 0 else "unclear"
