"""Studies that climb the ladder without training: trials end with values that a test makes up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zlib import crc32

from fleet import lease
from optuna.trial import FrozenTrial, TrialState

from tuner.datasets import Data
from tuner.ladder import rung_of
from tuner.ledger import Lease
from tuner.pulse import Pulse
from tuner.rungs.attempt import Attempt
from tuner.rungs.recipes import resolve
from tuner.rungs.results import constrain, finish
from tuner.session import Session

Score = Callable[[Attempt], float]
UNIT = {"low": 0.0, "high": 1.0}
CLIMBING: dict[str, Any] = {
    "name": "climbing",
    "budget": {"trials": 21, "epochs": 3},
    "ladder": {"rungs": ["head", "full"], "head": {"trials": 40}},
    "search": {"algorithm": "random"},
    "space": {
        "optimizer": {"sgd": {"lr": {"low": 0.05, "high": 0.5, "log": True}}},
        "sampler": {"natural": {}, "class_aware": {"exponent": UNIT, "start": [0.0, 0.8]}},
        "loss": {
            "cross_entropy": {},
            "weighted_cross_entropy": {"power": UNIT},
            "label_smoothing": {"eps": {"low": 0.02, "high": 0.3}},
            "balanced_softmax": {},
            "vector_scaling": {"gamma": UNIT, "tau": UNIT},
            "focal": {"gamma": UNIT},
        },
    },
}


def end_next(session: Session, data: Data, score: Score, overall: float = 0.9) -> int | None:
    """End the next trial with the value ``score`` gives it; its number, None if there is none."""
    claimed = lease(session)
    return None if claimed is None else finish_with(session, claimed, data, score, overall)


def finish_with(
    session: Session, claimed: Lease, data: Data, score: Score, overall: float = 0.9
) -> int:
    """End the trial of a lease with the value ``score`` gives it; its number."""
    attempt = Attempt(session, claimed, Pulse(session.ledger, (claimed.worker_id, 1)))
    resolve(session, attempt.trial, data)
    value = score(attempt)
    metrics = {"tail_accuracy": value, "accuracy": overall, "balanced_accuracy": overall}
    both = {"raw": metrics, "adjusted": metrics}
    attempt.note({"metrics": both})
    attempt.at_step(0, value)
    constrain(attempt, both)
    finish(attempt, value)
    return attempt.number


def fail(session: Session, claimed: Lease) -> None:
    """End the trial of a lease without a result."""
    session.fenced.take(claimed)
    session.fenced.finish(claimed.trial_id, TrialState.FAIL, None, end="failed")


def fail_next(session: Session) -> None:
    """End the next trial without a result."""
    claimed = lease(session)
    assert claimed is not None
    fail(session, claimed)


def climb_to_the_top(session: Session, data: Data, score: Score) -> list[FrozenTrial]:
    """End all trials there are; they, by number."""
    while end_next(session, data, score) is not None:
        pass
    return session.trials()


def by_recipe(attempt: Attempt) -> float:
    """A value that only the recipe decides, alike at every rung."""
    return int(attempt.user_attrs["digest"], 16) % 997 / 997


def merit(attempt: Attempt) -> float:
    """A value that loss and sampler decide, alike at every rung."""
    recipe = attempt.user_attrs["recipe"]
    known = sorted((k, v) for part in ("loss", "sampler") for k, v in recipe[part].items())
    kept = [pair for pair in known if pair[0] != "start"]
    return crc32(str(kept).encode()) % 997 / 997


def opposite(attempt: Attempt) -> float:
    """What is good at a lower rung is bad at the last one."""
    value = merit(attempt)
    return value if rung_of(attempt) == "full" else 1 - value


def timed(head: float) -> Score:
    """``merit``, of trials that take so many seconds at the head rung, and five at full."""

    def score(attempt: Attempt) -> float:
        attempt.note({"seconds": head if rung_of(attempt) == "head" else 5.0})
        return merit(attempt)

    return score
