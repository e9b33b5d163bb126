"""How many trials the head rung has: it ends when it has taken its share of the time."""

from __future__ import annotations

import pytest
from climbers import CLIMBING, Score, climb_to_the_top, merit
from conftest import MakeSession

from tuner.climbing import is_over
from tuner.datasets import Data
from tuner.ladder import FEWEST_HEADS, rung_of
from tuner.planned import NEARLY, all_planned, at
from tuner.rungs.attempt import Attempt
from tuner.tickets import is_done

MANY = CLIMBING | {"ladder": {"rungs": ["head", "full"], "head": {"trials": 400}}}


def timed(head: float) -> Score:
    """``merit``, of trials that take so many seconds at the head rung, and five at full."""

    def score(attempt: Attempt) -> float:
        attempt.note({"seconds": head if rung_of(attempt) == "head" else 5.0})
        return merit(attempt)

    return score


@pytest.mark.parametrize(
    ("seconds", "trials"),
    [(0.01, 400), (0.05, 21 * 5.0 * 0.1 / 0.05), (1.0, FEWEST_HEADS)],
    ids=["cheap", "neither", "dear"],
)
def test_head_rung_ends_with_a_tenth_of_the_time_that_the_full_rung_takes(
    make_session: MakeSession, digits: Data, seconds: float, trials: float
) -> None:
    session = make_session(**MANY)
    climb_to_the_top(session, digits, timed(seconds))
    assert len(at(session, "head")) == pytest.approx(trials, rel=NEARLY)
    assert len(at(session, "full")) == 21
    assert is_done(session)
    assert all_planned(session) == len(session.trials())


@pytest.mark.parametrize(("share", "trials"), [("unlimited", 130), (0.0, FEWEST_HEADS)])
def test_share_of_the_head_rung_may_be_everything_or_nothing(
    make_session: MakeSession, digits: Data, share: object, trials: int
) -> None:
    head = {"trials": 130, "share": share}
    session = make_session(**MANY | {"ladder": {"rungs": ["head", "full"], "head": head}})
    climb_to_the_top(session, digits, timed(1.0))
    assert len(at(session, "head")) == trials


def test_head_rung_that_had_its_time_ends_though_its_first_trials_were_slow(
    make_session: MakeSession, digits: Data
) -> None:
    """What a trial takes is known once some ended, and warming up is not the rule."""
    session, ended = make_session(**MANY), 0

    def score(attempt: Attempt) -> float:
        nonlocal ended
        ended += rung_of(attempt) == "head"
        return timed(0.5 if ended <= 10 else 0.01)(attempt)

    climb_to_the_top(session, digits, score)
    assert len(at(session, "head")) == 400
    assert is_over(session, "head")


def test_larger_budget_is_that_of_the_full_rung_once_recipes_were_promoted(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**MANY)
    climb_to_the_top(session, digits, timed(0.05))
    before = len(at(session, "head"))
    larger = make_session(**MANY | {"budget": {"trials": 30, "epochs": 3}})
    climb_to_the_top(larger, digits, timed(0.05))
    assert len(at(larger, "head")) == before
    assert len(at(larger, "full")) == 30
