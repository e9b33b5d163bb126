"""A study ends by its budget, whichever part of it is reached first, for the whole fleet."""

from __future__ import annotations

from typing import Any

import pytest
from climbers import CLIMBING, end_next, finish_with
from conftest import MakeSession
from fleet import claim, give_back, lease
from optuna.trial import TrialState

from tuner.datasets import Data
from tuner.goals import reached, stop_if_reached
from tuner.session import Session
from tuner.tickets import MAX_BASELINES, fill_queue
from tuner.worker import work


def finish(session: Session, tail: float, overall: float = 0.9) -> None:
    trial = claim(session)
    assert trial is not None
    metrics = {"tail_accuracy": tail, "accuracy": overall, "balanced_accuracy": overall}
    trial.set_user_attr("metrics", {"raw": metrics, "adjusted": metrics})
    session.study.tell(trial, tail)


def test_target_is_reached_by_a_trial_that_keeps_the_floor(make_session: MakeSession) -> None:
    session = make_session(budget={"trials": 9, "epochs": 3, "target": 0.8})
    finish(session, 0.5)
    finish(session, 0.95, overall=0.3)
    assert reached(session) is None, "it breaks the floor"
    finish(session, 0.8)
    assert reached(session) == ("target", "trial 2 reached 0.8000")


def test_target_waits_for_the_floor_while_plain_cross_entropy_is_trained(
    make_session: MakeSession,
) -> None:
    session = make_session(budget={"trials": 9, "epochs": 3, "target": 0.8, "plateau": 1})
    baseline = claim(session)
    assert baseline is not None
    finish(session, 0.95, overall=0.3)
    finish(session, 0.5, overall=0.9)
    assert reached(session) is None, "nobody knows yet whether it keeps the floor"
    metrics = {"tail_accuracy": 0.1, "accuracy": 0.9, "balanced_accuracy": 0.9}
    baseline.set_user_attr("metrics", {"raw": metrics, "adjusted": metrics})
    session.study.tell(baseline, 0.1)
    assert reached(session) == ("plateau", "1 complete trial was not better than trial 2")
    session = make_session(budget={"trials": 9, "epochs": 3, "target": 0.4, "plateau": 1})
    assert reached(session) == ("target", "trial 2 reached 0.5000")


def test_target_does_not_wait_for_a_floor_that_never_comes(make_session: MakeSession) -> None:
    session = make_session(budget={"trials": 9, "epochs": 3, "target": 0.8})
    for _ in range(MAX_BASELINES):
        fill_queue(session)
        number = next(
            t.number for t in session.trials(TrialState.WAITING) if t.user_attrs.get("baseline")
        )
        while (tried := claim(session)) is not None and tried.number != number:
            give_back(session, tried)
        assert tried is not None
        assert reached(session) is None
        session.study.tell(tried, state=TrialState.FAIL)
    finish(session, 0.95)
    goal = reached(session)
    assert goal is not None
    assert goal[0] == "target"


def test_plateau_counts_the_trials_since_the_best(make_session: MakeSession) -> None:
    session = make_session(budget={"trials": 9, "epochs": 3, "plateau": 3})
    for tail in (0.5, 0.7, 0.6, 0.6):
        finish(session, tail)
    assert reached(session) is None
    finish(session, 0.65)
    goal = reached(session)
    assert goal is not None
    assert goal[0] == "plateau"


def test_plateau_and_target_are_of_the_last_rung(make_session: MakeSession) -> None:
    ladder = {"rungs": ["head", "full"], "head": {"trials": 4}}
    budget = {"trials": 9, "epochs": 3, "plateau": 2, "target": 0.8}
    session = make_session(budget=budget, ladder=ladder)
    finish(session, 0.5)
    fill_queue(session)
    for _ in range(4):
        trial = claim(session)
        assert trial is not None
        assert trial.user_attrs["fidelity"] == "head"
        trial.report(0.9, step=0)
        trial.set_user_attr("reason", "head")
        session.study.tell(trial, state=TrialState.PRUNED)
    assert reached(session) is None


def test_plateau_is_counted_once_the_rungs_below_are_over(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING | {"budget": {"trials": 21, "epochs": 3, "plateau": 3}})
    end_next(session, digits, lambda _: 0.5)
    below = [lease(session) for _ in range(40)]
    for _ in range(4):
        end_next(session, digits, lambda _: 0.4)
    assert reached(session) is None, "these only compare the rungs; nothing is promoted yet"
    for claimed in below:
        assert claimed is not None
        finish_with(session, claimed, digits, lambda _: 0.4)
    goal = reached(session)
    assert goal is not None
    assert goal[0] == "plateau"


def test_reached_goal_stops_everybody_and_no_ticket_is_given_out(
    make_session: MakeSession,
) -> None:
    session = make_session(budget={"trials": 9, "epochs": 3, "target": 0.4})
    finish(session, 0.5)
    stop_if_reached(session)
    assert session.ledger.order().reason == "target"
    assert lease(session) is None


def test_worker_stops_at_the_target_and_leaves_the_rest_waiting(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(budget={"trials": 4, "epochs": 3, "target": 0.01})
    assert work(session, digits) == 1
    states = [t.state for t in session.trials()]
    assert states == [TrialState.COMPLETE, *[TrialState.WAITING] * 3]


@pytest.mark.parametrize("limit", ["gpu_hours", "hours"])
def test_time_that_is_used_up_stops_within_an_epoch_and_keeps_the_trial(
    limit: str, make_session: MakeSession, digits: Data
) -> None:
    session = make_session(budget={"trials": 4, "epochs": 500, limit: 0.3 / 3600})
    assert work(session, digits) == 0
    assert session.ledger.order().reason == limit
    assert {t.state for t in session.trials()} == {TrialState.WAITING}
    (attempt,) = session.ledger.attempts()
    assert (attempt["end"], attempt["reason"]) == ("preempted", f"stop: {limit}")
    assert 0 < attempt["seconds"] < 3


def test_larger_budget_lets_a_study_that_had_reached_its_goal_go_on(
    make_session: MakeSession,
) -> None:
    budget: dict[str, Any] = {"trials": 9, "epochs": 3, "target": 0.4}
    session = make_session(budget=budget)
    finish(session, 0.5)
    stop_if_reached(session)
    assert make_session(budget=budget).ledger.order().state == "stop"
    assert make_session(budget=budget | {"target": 0.9}).ledger.order().state == "run"


def test_order_to_stop_is_not_undone_by_a_larger_budget(make_session: MakeSession) -> None:
    make_session().ledger.give_order("stop", "asked for")
    again = make_session(budget={"trials": 9, "epochs": 3})
    assert again.ledger.order().state == "stop"
