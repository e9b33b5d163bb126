"""What a trial is warned of: parts that never act, and nothing that is as it should be."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import MakeSession
from fleet import claim, run_next

from tuner.datasets import Data
from tuner.rungs.recipes import resolve
from tuner.session import Session

DEFERRED = {"name": "deferred", "switch": 0.8}
WEIGHTED = {"name": "weighted_cross_entropy", "power": 0.1, "start": 0.9}
LATE = {"loss": {"name": "focal"}, "training": DEFERRED}
NEVER = "a part that starts at {} % of the training never acts in {}"


def warning(session: Session, digits: Data) -> str:
    """What the next trial is warned of."""
    trial = claim(session)
    assert trial is not None
    resolve(session, trial, digits)
    return str(trial.user_attrs.get("warning", ""))


@pytest.mark.parametrize(
    ("number", "parts", "message"),
    [
        (1, {}, ""),
        (1, {"schedule": {"name": "cosine", "warmup_epochs": 5}}, ""),
        (1, LATE, NEVER.format(80, "1 epoch, because")),
        (4, LATE, NEVER.format(80, "4 epochs, because")),
        (5, LATE, ""),
        (9, {"loss": WEIGHTED}, NEVER.format(90, "9 epochs, because")),
        (10, {"loss": WEIGHTED}, ""),
        (1, {"loss": {**WEIGHTED, "power": 0.0}}, ""),
        (1, {"sampler": {"name": "effective_number", "start": 0.5}}, NEVER.format(50, "1 epoch")),
        (1, {"training": DEFERRED}, ""),
    ],
)
def test_trial_is_warned_of_a_part_that_never_acts_and_of_nothing_else(
    number: int, parts: dict[str, Any], message: str, make_session: MakeSession, digits: Data
) -> None:
    space = {"optimizer": {"sgd": {"lr": {"low": 0.05, "high": 0.5, "log": True}}}}
    session = make_session(budget={"trials": 4, "epochs": number}, space=space, **parts)
    claim(session)  # plain cross-entropy
    found = warning(session, digits)
    assert message in found
    assert bool(message) == bool(found)


def test_head_rung_has_epochs_of_its_own_to_start_in(
    make_session: MakeSession, digits: Data
) -> None:
    space = {"loss": {"weighted_cross_entropy": {"power": [0.1, 0.2]}}}
    budget, ladder = {"trials": 4, "epochs": 1}, {"rungs": ["head"]}
    session = make_session(budget=budget, ladder=ladder, space=space, training=DEFERRED)
    run_next(session, digits)
    assert warning(session, digits) == ""
