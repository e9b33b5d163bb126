"""Plain cross-entropy gets its fair share of a search, whatever proposes."""

from __future__ import annotations

from typing import Any

import pytest
from climbers import CLIMBING, climb_to_the_top, end_next, merit
from conftest import MakeFile, MakeSession
from optuna.trial import FrozenTrial

from tuner.confirm import contenders, tuned_with
from tuner.datasets import Data
from tuner.errors import StudyFileError
from tuner.ladder import rung_of
from tuner.plain import choice, fair_share, is_plain
from tuner.proposals import proposing
from tuner.rungs.peers import Peers
from tuner.search import STARTUP_TRIALS
from tuner.session import Session
from tuner.tickets import ladder_state

TWO = {"cross_entropy": {}, "focal": {"gamma": {"low": 0.0, "high": 1.0}}}
LR = {"sgd": {"lr": {"low": 0.05, "high": 0.5, "log": True}}}


def study(trials: int = 24, **changes: Any) -> dict[str, Any]:
    """A study of one rung that confirms; the head rung comes before it if asked for."""
    ladder = {"rungs": ["full", "confirm"], "confirm": {"recipes": 2, "seeds": 2}}
    budget = {"trials": trials, "epochs": 3}
    return {**CLIMBING, "training": None, "ladder": ladder, "budget": budget} | changes


def with_plain(value: Any, *below: str) -> dict[str, Any]:
    rungs = [*below, "full", "confirm"]
    confirm = {"recipes": 2, "seeds": 2, "plain": value}
    return {"rungs": rungs, "head": {"trials": 40}, "confirm": confirm}


def tuning(session: Session) -> list[FrozenTrial]:
    """Trials that were set apart for plain cross-entropy."""
    return [trial for trial in session.trials() if trial.user_attrs.get("plain")]


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 4),
        ({"budget": {"trials": 60, "epochs": 3}}, 10),
        ({"budget": {"trials": 60, "epochs": 3}, "space": {"loss": TWO, "optimizer": LR}}, 30),
        ({"budget": {"trials": 6, "epochs": 3}, "space": {"loss": TWO, "optimizer": LR}}, 3),
        ({"ladder": with_plain(0)}, 0),
        ({"ladder": with_plain(0.5)}, 12),
        ({"ladder": {"rungs": ["full"]}}, 0),
        ({"space": {"loss": TWO}}, 0),
        ({"space": {"loss": {"focal": TWO["focal"]}, "optimizer": LR}}, 0),
        ({"space": {"loss": TWO, "sampler": {"class_aware": {}}, "optimizer": LR}}, 0),
        ({"search": {"algorithm": "grid"}, "budget": {"epochs": 3}, "space": {"loss": {
            "cross_entropy": {}, "focal": {"gamma": [1.0, 2.0]}}}}, 0),
    ],
)  # fmt: skip
def test_share_is_that_of_every_loss_and_four_trials_at_the_least(
    make_file: MakeFile, changes: dict[str, Any], share: int
) -> None:
    assert fair_share(make_file(**study(**changes))) == share


def test_more_than_half_of_the_trials_is_refused(make_file: MakeFile) -> None:
    with pytest.raises(StudyFileError, match=r"ladder.confirm.plain"):
        make_file(**study(ladder=with_plain(0.7)))


@pytest.mark.parametrize(
    ("algorithm", "trials", "below"),
    [("tpe", 24, ()), ("random", 24, ()), ("random", 24, ("head",)), ("gp", 12, ())],
)
def test_every_algorithm_proposes_the_share_with_everything_else_open(
    make_session: MakeSession, digits: Data, algorithm: str, trials: int, below: tuple[str, ...]
) -> None:
    ladder = with_plain("equal", *below)
    session = make_session(**study(trials, ladder=ladder, search={"algorithm": algorithm}))
    climb_to_the_top(session, digits, merit)
    own = tuning(session)
    assert len(own) == fair_share(session.file) - 1 == 3
    assert all(is_plain(trial) for trial in own)
    assert len({trial.params["optimizer.sgd.lr"] for trial in own}) > 1
    full = [t for t in session.trials() if rung_of(t) == "full"]
    assert len(full) == trials, "the budget stays"
    plain = sum(map(is_plain, full))
    assert tuned_with(session) == (plain, trials)
    assert plain >= 4
    said = f"plain cross-entropy was tuned with {plain} of {trials} trials"
    assert said in ladder_state(session)
    assert "tuned" in contenders(session).values()


def test_share_is_spread_over_the_proposals(make_session: MakeSession, digits: Data) -> None:
    session = make_session(**study(60))
    places = [trial.number for trial in tuning(session)]
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert len(places) == 9
    assert max(gaps) - min(gaps) <= 1
    assert min(places) > 5, "defaults come first"


def test_balanced_stages_are_no_plain_cross_entropy(
    make_session: MakeSession, digits: Data
) -> None:
    trainings: dict[str, Any] = {"two_stage": {}, "single_stage": {}}
    session = make_session(**study(space={**CLIMBING["space"], "training": trainings}))
    assert (choice(session.file.space) or {})["training"] == "single_stage"
    trials = climb_to_the_top(session, digits, merit)
    two = [t for t in trials if t.user_attrs["recipe"]["training"]["name"] == "two_stage"]
    assert two
    assert not any(map(is_plain, two))
    only = make_session(
        **study(name="only", space=CLIMBING["space"] | {"training": {"two_stage": {}}})
    )
    assert choice(only.file.space) is None


def test_who_tunes_plain_cross_entropy_learns_from_it_alone_once_there_is_enough(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**study(ladder=with_plain(0.5), search={"algorithm": "tpe"}))

    def seen() -> list[FrozenTrial]:
        return proposing(session, "full", 99, plain=True).get_trials(deepcopy=False)

    while tuned_with(session)[0] < STARTUP_TRIALS:
        assert not all(map(is_plain, seen()))
        end_next(session, digits, merit)
    assert all(map(is_plain, seen()))
    others = proposing(session, "full", 99).get_trials(deepcopy=False)
    assert not all(map(is_plain, others))


def test_plain_cross_entropy_is_pruned_beside_its_like_only(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**study())
    trials = climb_to_the_top(session, digits, merit)
    peers = Peers(session)
    own = peers.now("full", plain=True)
    assert {curve.loss for curve in own.curves} == {"cross_entropy"}
    distinct = [t for t in trials if is_plain(t) and "confirms" not in t.user_attrs]
    assert len(own) == len(distinct)
    assert len(peers.now("full")) > len(own)
