"""The answer of a study: its best recipe beside plain cross-entropy, on images never searched."""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial
from torch import Tensor

from tuner import artifacts
from tuner.confirm import entrants
from tuner.confirmation import confirmation
from tuner.datasets import Data, Part
from tuner.evaluation import adjusted_logits
from tuner.metrics import confusion_matrix, evaluate, recall_per_class
from tuner.rounds import winner
from tuner.session import Session
from tuner.statistics import bootstrap_intervals, holm, paired_difference
from tuner.trained import trained_lane

COMPARED = ("tail_accuracy", "head_accuracy", "accuracy", "balanced_accuracy")


def decide(session: Session, data: Data, *, device: str = "cpu") -> dict[str, Any] | None:
    """Compare the best trial with the baseline on the test part, and store the answer.

    The search never sees the test part; it is looked at here, once for every new best trial, and
    once more when the confirm rung is over, or has another training. Where the data have none, the
    validation part stands in, and the answer says so. None while the baseline or any other trial
    is missing.
    """
    best, baseline = session.best(), session.baseline()
    if best is None or baseline is None:
        return None
    known: dict[str, Any] | None = session.study.user_attrs.get("verdict")
    again = {} if winner(session) is None else _trained_again(session)
    asked = (best.number, baseline.number, again)
    if known and _asked(known) == asked:
        return known
    verdict = _compare(session, best, baseline, data, device)
    verdict["confirmed"] = confirmation(session, data, COMPARED, device=device)
    session.study.set_user_attr("verdict", verdict)
    if verdict["confirmed"]:
        # Only now are the models of the other recipes not needed any more.
        artifacts.keep_weights_only_of(session.store, lambda: _needed(session, best, baseline))
    return verdict


def _asked(verdict: dict[str, Any]) -> tuple[int, int, dict[int, int]]:
    """What a verdict is about: the two trials, and those that were confirmed, how often."""
    rows = (verdict.get("confirmed") or {"recipes": []})["recipes"]
    again = {row["trial"]: sum(value is not None for value in row["values"]) for row in rows}
    return verdict["best"], verdict["baseline"], again


def _trained_again(session: Session) -> dict[int, int]:
    """How often recipes of the confirm rung were trained to the end, by number of the trial."""
    return {each.trial.number: len(each.runs) for each in entrants(session)}


def _needed(session: Session, *compared: FrozenTrial) -> set[int]:
    """Trials whose weights the verdict is of, or the next one will be."""
    now = (session.best(), session.baseline())
    return {_source(trial) for trial in (*compared, *now) if trial is not None}


def _source(trial: FrozenTrial) -> int:
    """The trial whose weights a trial's are."""
    number: int = trial.user_attrs.get("duplicate_of", trial.number)
    return number


def _compare(
    session: Session, best: FrozenTrial, baseline: FrozenTrial, data: Data, device: str
) -> dict[str, Any]:
    objective = session.file.objective
    part = data.test or data.validation
    tau = best.user_attrs["tau"] if objective.adjusted else 0.0
    free = baseline.user_attrs["tau"]
    plain = _logits(session, baseline, data, part, device)
    adjusted = adjusted_logits(plain, data.class_counts, free)
    chosen = adjusted_logits(_logits(session, best, data, part, device), data.class_counts, tau)
    rows = [
        _row("plain cross-entropy", baseline.number, 0.0, plain, part, data),
        _row("best recipe", best.number, tau, chosen, part, data),
        _row("plain cross-entropy, adjusted", baseline.number, free, adjusted, part, data),
    ]
    return {
        "part": "validation" if data.test is None else "test",
        "best": best.number,
        "baseline": baseline.number,
        "counts": part.targets.bincount(minlength=data.num_classes).tolist(),
        "rows": rows,
        "objective": objective.metric,
        "differences": _differences(chosen.argmax(1), plain.argmax(1), part, data),
        "beyond_adjustment": _differences(chosen.argmax(1), adjusted.argmax(1), part, data),
        "validation_value": best.value,
        "test_value": rows[1]["metrics"][objective.metric],
    }


def _logits(session: Session, trial: FrozenTrial, data: Data, part: Part, device: str) -> Tensor:
    return trained_lane(session, trial, data, device).logits(part.images)


def _row(
    name: str, number: int, tau: float, logits: Tensor, part: Part, data: Data
) -> dict[str, Any]:
    targets = part.targets.cpu()
    recalls = recall_per_class(confusion_matrix(logits.argmax(1), targets, data.num_classes))
    intervals = bootstrap_intervals(logits, targets, data.groups, seed=0)
    return {
        "name": name,
        "trial": number,
        "tau": tau,
        "metrics": evaluate(logits, targets, data.groups),
        "intervals": {k: None if v is None else [v.low, v.high] for k, v in intervals.items()},
        "recall_per_class": [None if r != r else r for r in recalls.tolist()],
    }


def _differences(chosen: Tensor, plain: Tensor, part: Part, data: Data) -> dict[str, Any]:
    """Best minus baseline on the same images, for every compared metric that can be had.

    The p-values are adjusted for there being several (Holm 1979); the intervals are not.
    """
    targets = part.targets.cpu()
    found = {
        metric: paired_difference(chosen, plain, targets, metric=metric, groups=data.groups, seed=0)
        for metric in COMPARED
    }
    known = {metric: difference for metric, difference in found.items() if difference is not None}
    adjusted = holm([difference.p_value for difference in known.values()])
    return {
        metric: {
            "estimate": difference.estimate,
            "low": difference.interval.low,
            "high": difference.interval.high,
            "p_value": p_value,
        }
        for (metric, difference), p_value in zip(known.items(), adjusted, strict=True)
    }
