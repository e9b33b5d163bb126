"""How many trials the head rung has: it ends when it has taken its share of the time."""

from __future__ import annotations

import pytest
from climbers import CLIMBING, climb_to_the_top, timed
from conftest import MakeSession

from tuner.climbing import is_over
from tuner.datasets import Data
from tuner.ladder import FEWEST_HEADS, rung_of
from tuner.planned import NEARLY, all_planned, at
from tuner.rungs.attempt import Attempt
from tuner.tickets import is_done

BY_COST = CLIMBING | {"ladder": {"rungs": ["head", "full"]}}


@pytest.fixture(autouse=True)
def _fewer_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand trials take a while, trained or not."""
    monkeypatch.setattr("tuner.ladder.MOST_HEADS", 300)


@pytest.mark.parametrize(
    ("seconds", "trials"),
    [(0.01, 300), (0.05, 21 * 5.0 * 0.1 / 0.05), (1.0, FEWEST_HEADS)],
    ids=["cheap", "neither", "dear"],
)
def test_head_rung_ends_with_a_tenth_of_the_time_that_the_full_rung_takes(
    make_session: MakeSession, digits: Data, seconds: float, trials: float
) -> None:
    session = make_session(**BY_COST)
    climb_to_the_top(session, digits, timed(seconds))
    assert len(at(session, "head")) == pytest.approx(trials, rel=NEARLY)
    assert len(at(session, "full")) == 21
    assert is_done(session)
    assert all_planned(session) == len(session.trials())


def test_head_rung_has_as_many_trials_as_a_study_says_whatever_they_take(
    make_session: MakeSession, digits: Data
) -> None:
    ladder = {"rungs": ["head", "full"], "head": {"trials": 130}}
    session = make_session(**BY_COST | {"ladder": ladder})
    climb_to_the_top(session, digits, timed(1.0))
    assert len(at(session, "head")) == 130


def test_share_of_the_head_rung_is_what_a_study_says(
    make_session: MakeSession, digits: Data
) -> None:
    ladder = {"rungs": ["head", "full"], "head": {"share": 0.2}}
    session = make_session(**BY_COST | {"ladder": ladder})
    climb_to_the_top(session, digits, timed(0.1))
    assert len(at(session, "head")) == pytest.approx(21 * 5.0 * 0.2 / 0.1, rel=NEARLY)


def test_head_rung_goes_on_though_its_first_trials_were_slow(
    make_session: MakeSession, digits: Data
) -> None:
    """What a trial takes is known once some ended, and warming up is not the rule."""
    session, ended = make_session(**BY_COST), 0

    def score(attempt: Attempt) -> float:
        nonlocal ended
        ended += rung_of(attempt) == "head"
        return timed(0.5 if ended <= 10 else 0.01)(attempt)

    climb_to_the_top(session, digits, score)
    assert len(at(session, "head")) == 300
    assert is_over(session, "head")


def test_head_rung_is_over_for_good_once_recipes_of_it_were_promoted(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**BY_COST)
    climb_to_the_top(session, digits, timed(0.05))
    before = len(at(session, "head"))
    larger = make_session(**BY_COST | {"budget": {"trials": 30, "epochs": 3}})
    climb_to_the_top(larger, digits, timed(0.05))
    assert len(at(larger, "head")) == before
    assert len(at(larger, "full")) == 30
