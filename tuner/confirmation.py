"""What the confirm rung found, as numbers to be stored with the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from tuner.confirm import Role, Standing, against, mean_breach, plain_of, standings, tuned_with
from tuner.datasets import Data
from tuner.evaluation import adjusted_logits
from tuner.metrics import METRICS, evaluate
from tuner.rounds import named, winner
from tuner.session import Session
from tuner.statistics import RepeatedDifference, holm
from tuner.trained import trained_lane

Found = dict[str, Any]
REFERENCES: tuple[Role, ...] = ("plain", "tuned")


ONE_TRAINING_EACH = (
    "One training of each is compared here. With fresh seeds the two recipes are not told apart, "
    "so the difference may be one of these two trainings only."
)
"""What a verdict says of two models that differ while the seeds do not tell their recipes apart."""


def confirmation(
    session: Session, data: Data, metrics: Sequence[str], *, device: str = "cpu"
) -> Found | None:
    """The recipes of the confirm rung, the best first, and what some of them have on test.

    Each has its value in the ``search``, its ``values`` by seed, and its differences of
    ``metrics`` to plain cross-entropy, with its defaults and tuned; the p-values of one metric are
    adjusted for there being several recipes (Holm 1979). ``tuned_with`` are the trials that tuned
    plain cross-entropy, and all of the full rung. A recipe that was ``dropped`` has values
    of the seeds it was trained with, and no differences: those would be too low on average. It
    counts as one of the several, with a p-value of 1, so that to drop it only ever takes away a
    finding. ``rivals`` are recipes with every seed that are not told apart from the first. On the
    test part only the first and plain cross-entropy are looked at, with every seed. None before
    the rung is over, and where every recipe failed with some seed.
    """
    if winner(session) is None:
        return None
    found = standings(session)
    objective, plain = session.file.objective.metric, plain_of(found)
    names = tuple(dict.fromkeys((*metrics, objective)))
    return {
        "seeds": session.file.ladder.confirm.seeds,
        "other_images": data.carved,
        "adjusted": session.file.objective.adjusted,
        "tuned_with": list(tuned_with(session)),
        "recipes": _rows(session, found, names),
        "rivals": [
            each.trial.number
            for each in found[1:]
            if not _is_dropped(session, each)
            and mean_breach(session, each, plain) <= 0
            and _is_rival(session, found[0], each)
        ],
        "test": [] if data.test is None else _on_test(session, found, data, names, device),
    }


def passed_over(found: Found, metric: str) -> list[int]:
    """Trials with every seed and a better mean than the first, which break the floor."""
    first, *others = [row for row in found["recipes"] if not row["dropped"]]
    sign = 1 if METRICS[metric] == "maximize" else -1
    return [
        row["trial"]
        for row in others
        if not row["keeps_floor"] and sign * (_mean(row) - _mean(first)) > 0
    ]


def better_but(trials: Sequence[int]) -> str:
    """What is said of those ``passed_over``."""
    better, breaks = ("are", "break") if len(trials) > 1 else ("is", "breaks")
    return f"{named(trials)} {better} better on average, but {breaks} the floor."


def _mean(row: Found) -> float:
    known = [value for value in row["values"] if value is not None]
    return fmean(known) if known else math.nan


def _is_dropped(session: Session, each: Standing) -> bool:
    """Whether a recipe was not trained with every seed, or failed with one."""
    return each.role == "recipe" and len(each.runs) < session.file.ladder.confirm.seeds


def _rows(session: Session, found: Sequence[Standing], names: Sequence[str]) -> list[Found]:
    plain, tuned = (next((s for s in found if s.role == role), None) for role in REFERENCES)
    to_plain, to_tuned = (_beside(session, found, other, names) for other in (plain, tuned))
    return [
        _row(session, each, plain)
        | {"to_plain": to_plain.get(each.trial.number, {})}
        | {"to_tuned": to_tuned.get(each.trial.number, {})}
        for each in found
    ]


def _beside(
    session: Session, found: Sequence[Standing], other: Standing | None, names: Sequence[str]
) -> dict[int, dict[str, Found]]:
    """Differences to plain cross-entropy by trial and metric; p-values are for all together."""
    if other is None:
        return {}
    compared = [each for each in found if each is not other and each.role != "plain"]
    told = [
        {} if _is_dropped(session, each) else against(session, each, other, names=names)
        for each in compared
    ]
    rows: dict[int, dict[str, Found]] = {each.trial.number: {} for each in compared}
    for name in names:
        p_values = holm([each[name].p_value if name in each else 1.0 for each in told])
        for each, differences, p_value in zip(compared, told, p_values, strict=True):
            if name in differences:
                rows[each.trial.number][name] = _difference(differences[name], p_value)
    return rows


def _row(session: Session, each: Standing, plain: Standing | None) -> Found:
    attrs, values = each.trial.user_attrs, each.objective()
    return {
        "trial": each.trial.number,
        "role": each.role,
        "loss": attrs["loss"],
        "sampler": attrs["sampler"],
        "search": each.trial.values[0],
        "values": [values.get(index) for index in sorted(each.ended)],
        "dropped": _is_dropped(session, each),
        "keeps_floor": bool(each.runs) and mean_breach(session, each, plain) <= 0,
    }


def _difference(found: RepeatedDifference, p_value: float) -> Found:
    low, high = found.interval.low, found.interval.high
    return {"estimate": found.estimate, "low": low, "high": high, "p_value": p_value}


def _is_rival(session: Session, first: Standing, other: Standing) -> bool:
    """Whether the seeds cannot tell a recipe from the first one; too few of them never do."""
    metric = session.file.objective.metric
    difference = against(session, first, other, names=[metric]).get(metric)
    if difference is None:
        return True
    sign = 1 if METRICS[metric] == "maximize" else -1
    edge = difference.interval.low if sign > 0 else -difference.interval.high
    return edge <= 0


def _on_test(
    session: Session, found: Sequence[Standing], data: Data, names: Sequence[str], device: str
) -> list[Found]:
    wanted = [each for each in found if each is found[0] or each.role != "recipe"]
    return [
        {
            "trial": each.trial.number,
            "role": each.role,
            "metrics": _by_seed(session, each, data, names, device),
        }
        for each in wanted
    ]


def _by_seed(
    session: Session, each: Standing, data: Data, names: Sequence[str], device: str
) -> dict[str, list[float | None]]:
    """Metrics of a recipe's models on the test part, each adjusted with its own τ."""
    assert data.test is not None
    targets, found = data.test.targets.cpu(), []
    for _, run in sorted(each.runs.items()):
        lane = trained_lane(session, run, data, device)
        tau = run.user_attrs["tau"] if session.file.objective.adjusted else 0.0
        logits = adjusted_logits(lane.logits(data.test.images), data.class_counts, tau)
        found.append(evaluate(logits, targets, data.groups))
    return {name: [metrics[name] for metrics in found] for name in names}


def spread(metric: str, values: Sequence[float | None]) -> str:
    """Mean and standard deviation over seeds, and how many of them failed; shares in percent."""
    known = [value for value in values if value is not None]
    failed = len(values) - len(known)
    lost = f", {failed} failed" if failed else ""
    if not known:
        return f"–{lost}"
    deviation = f" ± {amount(metric, stdev(known))}" if len(known) > 1 else ""
    return f"{amount(metric, fmean(known))}{deviation}{lost}"


def amount(metric: str, value: float) -> str:
    """A metric's value as people read it: shares in percent, the likelihood as it is."""
    return f"{value:.3f}" if metric == "nll" else f"{100 * value:.1f}"


def unit(metric: str) -> str:
    """What stands behind ``amount``."""
    return "" if metric == "nll" else " %"


def p_value(value: float) -> str:
    """A p-value to three places: ``p = 0.012``."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
