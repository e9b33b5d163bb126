"""What a study found: the comparison with plain cross-entropy, overall and class by class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tuner.metrics import METRICS
from tuner.report.data._moment import number, still
from tuner.statistics import wilson

if TYPE_CHECKING:
    from tuner.session import Session

Outcome = Literal["better", "worse", "unclear"]
SHOWN = ("tail_accuracy", "head_accuracy", "accuracy", "balanced_accuracy")
LEVEL = 0.05


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Difference:
    """Best recipe minus plain cross-entropy on the same images, with a 95 % interval."""

    estimate: float
    low: float
    high: float
    p_value: float
    outcome: Outcome


@dataclass(frozen=True)
class VerdictRow:
    """One metric of both models; None where the images cannot tell.

    ``adjusted`` is plain cross-entropy with logit adjustment, which needs no search.
    """

    metric: str
    baseline: Estimate | None
    best: Estimate | None
    difference: Difference | None
    adjusted: Estimate | None = None


@dataclass(frozen=True)
class VerdictData:
    """The comparison on images that the search did not choose by (or, without such, did).

    ``tau`` belongs to the best recipe, ``plain_tau`` to adjusted plain cross-entropy.
    ``newer_best`` is the study's best trial now, when it is another than the compared one.
    """

    part: str
    images: int
    best: int
    baseline: int
    tau: float
    plain_tau: float | None
    rows: tuple[VerdictRow, ...]
    metric: str
    validation_value: float | None
    test_value: float | None
    newer_best: int | None


@dataclass(frozen=True)
class ClassRecall:
    """One class: its group, its training and evaluation images, and how many are found."""

    name: str
    group: str
    training: int
    images: int
    baseline: Estimate | None
    best: Estimate | None


@dataclass(frozen=True)
class RecallData:
    """Recall of every class, largest class first, with 95 % Wilson intervals."""

    part: str
    classes: tuple[ClassRecall, ...]


def verdict_data(session: Session) -> VerdictData | None:
    """The stored comparison of the best recipe with plain cross-entropy; None before it."""
    session = still(session)
    verdict = session.study.user_attrs.get("verdict")
    if not verdict:
        return None
    objective, current = session.file.objective.metric, session.best()
    shown = SHOWN if objective in SHOWN else (objective, *SHOWN)
    newer = current.number if current and current.number != verdict["best"] else None
    return VerdictData(
        part=verdict["part"],
        images=sum(verdict["counts"]),
        best=verdict["best"],
        baseline=verdict["baseline"],
        tau=verdict["rows"][1]["tau"],
        plain_tau=verdict["rows"][2]["tau"] if verdict["rows"][2:] else None,
        rows=tuple(_row(metric, verdict) for metric in shown),
        metric=objective,
        validation_value=number(verdict.get("validation_value")),
        test_value=number(verdict.get("test_value")),
        newer_best=newer,
    )


def _row(metric: str, verdict: dict[str, Any]) -> VerdictRow:
    plain, best, *adjusted = (_estimate(row, metric) for row in verdict["rows"])
    difference = _difference(metric, verdict["differences"].get(metric))
    return VerdictRow(metric, plain, best, difference, *adjusted)


def _estimate(row: dict[str, Any], metric: str) -> Estimate | None:
    value = number(row["metrics"].get(metric))
    if value is None:
        return None
    low, high = row["intervals"].get(metric) or (None, None)
    return Estimate(value, low, high)


def _difference(metric: str, found: dict[str, float] | None) -> Difference | None:
    """A difference counts only where the interval and the test agree that it is one."""
    if not found:
        return None
    low, high, p_value = found["low"], found["high"], found["p_value"]
    up: Outcome = "better" if METRICS[metric] == "maximize" else "worse"
    down: Outcome = "worse" if up == "better" else "better"
    outcome: Outcome = "unclear"
    if p_value < LEVEL and (low > 0 or high < 0):
        outcome = up if low > 0 else down
    return Difference(found["estimate"], low, high, p_value, outcome)


def recall_data(session: Session) -> RecallData | None:
    """Recall per class of both models on the compared part; None before the comparison."""
    attrs = still(session).study.user_attrs
    verdict = attrs.get("verdict")
    if not verdict:
        return None
    names, training = attrs["class_names"], attrs["class_counts"]
    group_of = {c: group for group, members in attrs["groups"].items() for c in members}
    plain, best = (row["recall_per_class"] for row in verdict["rows"][:2])
    classes = [
        ClassRecall(
            name=str(names[c]),
            group=group_of.get(c, "medium"),
            training=training[c],
            images=images,
            baseline=_recall(plain[c], images),
            best=_recall(best[c], images),
        )
        for c, images in enumerate(verdict["counts"])
    ]
    classes.sort(key=lambda c: -c.training)
    return RecallData(verdict["part"], tuple(classes))


def _recall(share: float | None, images: int) -> Estimate | None:
    if share is None or images == 0:
        return None
    interval = wilson(round(share * images), images)
    return Estimate(share, interval.low, interval.high)
