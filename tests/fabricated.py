"""Studies made up without training: the attributes that workers would have written, by hand."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import optuna
from optuna.samplers import RandomSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import TrialState

from tuner import study as study_file
from tuner.ledger import FencedStorage
from tuner.session import Session
from tuner.stores import FolderStore

TEXT = """
name = "{name}"
[data]
name = "digits"
[objective]
metric = "{metric}"
floor = {{ metric = "accuracy", drop = 0.02 }}
[budget]
trials = {trials}
epochs = 10
{ladder}
[model]
name = "mlp"
[space.optimizer.sgd]
lr = {{ low = 0.01, high = 1.0, log = true }}
[space.sampler.natural]
[space.sampler.class_aware]
exponent = {{ low = 0.0, high = 1.0 }}
[space.loss.cross_entropy]
[space.loss.class_balanced]
beta = [0.9, 0.99, 0.999]
[space.loss.asymmetric]
gamma_neg = [0.0, 1.0, 2.0]
[space.loss.ldam]
max_margin = {{ low = 0.1, high = 0.6 }}
"""
COUNTS = (500, 300, 180, 108, 65, 39, 23, 14, 8, 5)
GROUPS = {"head": [0, 1, 2], "medium": [3, 4, 5, 6], "tail": [7, 8, 9]}
LOSSES = ("cross_entropy", "class_balanced", "asymmetric", "ldam")
SCRIPT = "<script>alert(1)</script>"
STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def empty_session(
    folder: Path,
    storage: BaseStorage | None = None,
    *,
    name: str = "fabricated",
    metric: str = "tail_accuracy",
    trials: int = 40,
    ladder: str = "",
    **facts: Any,
) -> Session:
    """A session whose study holds its facts and no trial; ``ladder`` is that table as TOML."""
    text = TEXT.format(name=name, metric=metric, trials=trials, ladder=ladder)
    file = study_file.parse(tomllib.loads(text), text, where="test")
    study = optuna.create_study(
        study_name=name,
        storage=storage or InMemoryStorage(),
        direction="minimize" if metric == "nll" else "maximize",
        sampler=RandomSampler(seed=0),
    )
    known = {
        "study_file": text,
        "tuner_version": "0.1.0",
        "fingerprint": "f" * 64,
        "class_names": [f"digit {c}" for c in range(10)],
        "class_counts": list(COUNTS),
        "validation_counts": [30] * 10,
        "groups": GROUPS,
        "warnings": [],
    }
    for key, value in {**known, **facts}.items():
        study.set_user_attr(key, value)
    return Session(file, study, FolderStore(folder), cast(FencedStorage, None))


def add_trial(
    session: Session,
    *values: float,
    loss: str = "class_balanced",
    state: Literal["complete", "pruned", "failed", "running"] = "complete",
    head: float = 0.9,
    accuracy: float = 0.8,
    epochs: int = 10,
    first: int = 0,
    **attrs: Any,
) -> int:
    """Add a trial with these values after its epochs, from ``first`` on; its number."""
    session.study.enqueue_trial({"loss": loss})
    trial = session.study.ask()
    recipe = session.file.space.suggest(trial)
    facts: dict[str, Any] = {
        "recipe": {**recipe.to_dict(), "data": {"name": "digits"}},
        "loss": loss,
        "sampler": trial.params["sampler"],
        "kappa": 0.5,
        "epochs": epochs,
        "settled": 0.1,
    }
    if state == "complete":
        facts |= {"tau": 0.7, "metrics": metrics(values[-1], head, accuracy)}
    for key, fact in {**facts, **attrs}.items():
        trial.set_user_attr(key, fact)
    if state == "complete" and not attrs.get("baseline"):
        violation = session.floor_violation(trial.user_attrs["metrics"])
        if violation is not None:
            trial.set_constraint("floor", violation)
    for epoch, value in enumerate(values, start=first):
        trial.report(value, step=epoch)
    if state != "running":
        result = values[-1] if state == "complete" else None
        session.study.tell(trial, result, state=STATES[state])
    return trial.number


def add_head(session: Session, value: float, **attrs: Any) -> int:
    """Add a trial that was trained to the end of the head rung, below another; its number."""
    facts: dict[str, Any] = {"metrics": metrics(value, 0.9, 0.8), "tau": 0.7, "seconds": 0.5}
    facts |= {"fidelity": "head", "reason": "head"}
    return add_trial(session, value, state="pruned", **facts | attrs)


LADDER = """[ladder]
rungs = ["head", "full"]
[ladder.head]
trials = 8
"""


def ladder_session(
    folder: Path,
    storage: BaseStorage | None = None,
    *,
    agree: bool = True,
    heads: int = 8,
    ladder: str = LADDER,
) -> Session:
    """A study of a head and a full rung that rank the recipes alike, or the other way round.

    Each loss is tried with its default, and the four best are promoted. Trials 1 to ``heads``
    are of the head rung.
    """
    session = empty_session(folder, storage, name="ladder", trials=9, ladder=ladder)
    add_trial(session, 0.3, 0.4, loss="cross_entropy", baseline=True, seconds=20.0)
    for position in range(heads):
        preset = {"preset": LOSSES[position]} if position < len(LOSSES) else {}
        add_head(session, 0.4 + 0.05 * (position % 8), loss=LOSSES[position % 4], **preset)
    tickets: list[dict[str, Any]] = [{"preset": loss} for loss in LOSSES[1:]]
    tickets += [{"promoted_from": number} for number in (8, 7, 6)]
    for place, ticket in enumerate(tickets):
        value = 0.4 + 0.05 * (place + 1 if place < 3 else 10 - place)
        attrs: dict[str, Any] = {**ticket, "compares": True, "seconds": 10.0}
        add_trial(session, value if agree else 1 - value, loss=LOSSES[(place + 1) % 4], **attrs)
    add_trial(session, 0.5, state="pruned", reason="behind", seconds=5.0)
    add_trial(session, 0.55, promoted_from=8, unseen=True, seconds=10.0)
    return session


def metrics(tail: float, head: float, accuracy: float) -> dict[str, dict[str, float]]:
    """Raw and adjusted metrics; raw ones are five points lower on the tail."""
    adjusted = {"tail_accuracy": tail, "head_accuracy": head, "accuracy": accuracy, "nll": tail}
    adjusted["balanced_accuracy"] = accuracy
    return {"raw": {**adjusted, "tail_accuracy": tail - 0.05}, "adjusted": adjusted}


def verdict(best: int, baseline: int = 0, **changes: Any) -> dict[str, Any]:
    """A comparison in which the tail gains, the head loses, and the rest cannot be told."""
    plain = {"tail_accuracy": 0.4, "head_accuracy": 0.95, "accuracy": 0.7, "balanced_accuracy": 0.7}
    ours = {"tail_accuracy": 0.6, "head_accuracy": 0.9, "accuracy": 0.71, "balanced_accuracy": None}
    free = {**plain, "tail_accuracy": 0.5, "accuracy": 0.69}
    return {
        "part": "test",
        "best": best,
        "baseline": baseline,
        "counts": [20] * 9 + [0],
        "rows": [
            _row("plain cross-entropy", baseline, 0.0, plain, 0.0),
            _row("best recipe", best, 0.7, ours, 0.02),
            _row("plain cross-entropy, adjusted", baseline, 1.2, free, 0.01),
        ],
        "differences": {
            "tail_accuracy": {"estimate": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.0002},
            "head_accuracy": {"estimate": -0.05, "low": -0.08, "high": -0.02, "p_value": 0.01},
            "accuracy": {"estimate": 0.01, "low": -0.02, "high": 0.04, "p_value": 0.6},
        },
        "validation_value": 0.66,
        "test_value": 0.6,
        **changes,
    }


def _row(
    name: str, trial: int, tau: float, values: Mapping[str, float | None], gain: float
) -> dict[str, Any]:
    recalls: Sequence[float | None] = [0.95 - c * (0.08 - gain) for c in range(9)] + [None]
    return {
        "name": name,
        "trial": trial,
        "tau": tau,
        "metrics": values,
        "intervals": {k: None if v is None else [v - 0.05, v + 0.05] for k, v in values.items()},
        "recall_per_class": [None if r is None else round(20 * r) / 20 for r in recalls],
    }


def rich_session(
    folder: Path, storage: BaseStorage | None = None, *, name: str = "fabricated"
) -> Session:
    """A finished study of 40 trials with every state, and hostile texts in its facts."""
    names = [SCRIPT] + [f"digit {c}" for c in range(1, 10)]
    warning = f"class {SCRIPT} has only 500 training images"
    session = empty_session(folder, storage, name=name, class_names=names, warnings=[warning])
    draw = random.Random(0)
    add_trial(session, *_curve(draw, 0.45), loss="cross_entropy", baseline=True, seconds=20.0)
    best, highest = 0, 0.0
    for position in range(1, 39):
        loss, goal = LOSSES[position % 4], draw.uniform(0.4, 0.68) + 0.02 * (position % 4)
        kind = _kind(position)
        curve = _curve(draw, goal)[: 10 if kind == "complete" else draw.randint(5, 8)]
        attrs = {"seconds": 2.0 * len(curve), **_reason(kind, position)}
        accuracy = 0.95 - 0.3 * goal
        number = add_trial(
            session,
            *curve,
            loss=loss,
            state=kind,
            head=1.1 - 0.45 * goal + draw.uniform(-0.03, 0.03),
            accuracy=accuracy,
            **attrs,
        )
        if kind == "complete" and accuracy >= 0.78 and curve[-1] > highest:
            best, highest = number, curve[-1]
    add_trial(session, 0.3, 0.35, 0.4, state="running")
    session.study.set_user_attr("verdict", verdict(best))
    return session


def _kind(position: int) -> Literal["complete", "pruned", "failed"]:
    if position == 17:
        return "failed"
    return "pruned" if position % 3 == 0 else "complete"


def _reason(kind: str, position: int) -> dict[str, Any]:
    if kind == "pruned":
        return {"reason": "behind" if position % 2 else "chance"}
    if kind == "failed":
        return {"reason": "out_of_memory"}
    return {"would_prune_at": 6} if position % 10 == 0 else {}


def _curve(draw: random.Random, goal: float) -> list[float]:
    return [goal * (1 - 0.6 ** (epoch + 1)) + draw.uniform(-0.01, 0.01) for epoch in range(10)]
