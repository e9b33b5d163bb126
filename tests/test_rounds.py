"""Who goes on at the confirm rung: by all results of a seed, in whatever order they come."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from climbers import CLIMBING, Score, climb_to_the_top, end_next, fail, finish_with
from conftest import MakeSession
from fleet import lease
from optuna.trial import TrialState
from rich.console import Console

from tuner.cli.confirmed import confirmed_lines, confirmed_table
from tuner.confirm import contenders, standings
from tuner.confirmation import confirmation
from tuner.datasets import Data
from tuner.ladder import ConfirmRung, rung_of
from tuner.ledger import Lease
from tuner.report import data as numbers
from tuner.report.confirmed import confirmed, shrinkage, tuned
from tuner.rounds import confirm_lines, winner
from tuner.rungs.attempt import Attempt
from tuner.session import Session
from tuner.tickets import retry_failed

METRIC = "tail_accuracy"
CONFIRM: dict[str, Any] = {"recipes": 4, "seeds": 3, "plain": 0}


def ladder(**settings: Any) -> dict[str, Any]:
    return {"rungs": ["full", "confirm"], "confirm": CONFIRM | settings}


SEARCH: dict[str, Any] = {**CLIMBING, "ladder": ladder(), "budget": {"trials": 8, "epochs": 3}}


def by_seed(session: Session) -> Counter[int]:
    """How many trainings there are with each seed."""
    return Counter(t.user_attrs["fold"] for t in session.trials() if rung_of(t) == "confirm")


def by_number(attempt: Attempt) -> float:
    """Later trials of the search are better, with every seed."""
    number: int = attempt.user_attrs.get("confirms", attempt.number)
    return (number + 1) / 10


def noisy(attempt: Attempt) -> float:
    """A value that the search's trial and the seed decide."""
    origin = attempt.user_attrs.get("confirms", attempt.number)
    return random.Random(f"{origin} {attempt.user_attrs.get('fold')}").random()


def leases(session: Session) -> list[Lease]:
    """All that can be claimed at this moment."""
    return list(iter(lambda: lease(session), None))


def answer(session: Session) -> int | None:
    """Number of the trial that was confirmed as the best."""
    best = winner(session)
    return None if best is None else best.number


def end_search(session: Session, data: Data) -> None:
    for _ in range(8):
        end_next(session, data, by_number)


def test_half_of_the_recipes_go_on_after_each_seed_and_two_to_the_end() -> None:
    settings = ConfirmRung()
    assert [settings.going_on(count) for count in (7, 4, 2, 1, 0)] == [4, 2, 2, 1, 0]
    assert settings.most() == 7 + 4 + 2 + 2 + 2 * 4
    assert ConfirmRung(recipes=5, seeds=4, keep=1.0).most() == 7 * 4
    assert ConfirmRung(keep=0.1).going_on(30) == 3, "not one more for how 0.1 is stored"


def test_the_best_so_far_go_on_and_plain_cross_entropy_has_every_seed(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    trials = climb_to_the_top(session, digits, by_number)
    had = Counter(t.user_attrs["confirms"] for t in trials if rung_of(t) == "confirm")
    assert had == {0: 3, 7: 3, 6: 3, 5: 1, 4: 1}
    assert contenders(session)[0] == "plain"
    assert answer(session) == 7
    assert confirm_lines(session)[1:3] == [
        "confirm 11 of 11 trials",
        "trials 4, 5 dropped after 1 of 3 seeds",
    ]


def test_nobody_goes_on_before_all_have_the_seed(make_session: MakeSession, digits: Data) -> None:
    session = make_session(**SEARCH)
    end_search(session, digits)
    held = leases(session)
    ahead = {t.user_attrs["confirms"] for t in session.trials() if t.user_attrs.get("fold")}
    assert by_seed(session) == {0: 5, 1: 1, 2: 1}
    assert ahead == {0}, "whoever would wait trains plain cross-entropy with the seeds to come"
    for claimed in held[1:]:
        finish_with(session, claimed, digits, by_number)
    assert lease(session) is None
    finish_with(session, held[0], digits, by_number)
    assert lease(session) is not None
    assert by_seed(session) == {0: 5, 1: 3, 2: 1}


@pytest.mark.parametrize("order", range(3))
def test_who_goes_on_does_not_depend_on_the_order_of_results(
    make_session: MakeSession, digits: Data, order: int
) -> None:
    session = make_session(**SEARCH)
    end_search(session, digits)
    shuffle = random.Random(order).shuffle
    while claimed := leases(session):
        shuffle(claimed)
        for one in claimed:
            finish_with(session, one, digits, noisy)
    last: dict[int, int] = {}
    for trial in session.trials():
        if rung_of(trial) == "confirm":
            origin, fold = trial.user_attrs["confirms"], trial.user_attrs["fold"]
            last[origin] = max(fold, last.get(origin, 0))
    assert last == expected(session)


def expected(session: Session) -> dict[int, int]:
    """The last seed of each recipe by the rule, worked out from the values alone."""

    def value(number: int, fold: int) -> float:
        return random.Random(f"{number} {fold}").random()

    roles = contenders(session)
    going = [number for number, role in roles.items() if role == "recipe"]
    last = {number: 2 for number, role in roles.items() if role != "recipe"}
    for fold in range(3):
        last |= dict.fromkeys(going, fold)
        mean = {n: (n + 1) / 10 + sum(value(n, f) for f in range(fold + 1)) for n in going}
        going = sorted(going, key=lambda n: -mean[n])[:2]
    return last


def test_a_lost_lease_drops_nobody(make_session: MakeSession, digits: Data) -> None:
    session = make_session(**SEARCH)
    end_search(session, digits)
    claimed = lease(session)
    assert claimed is not None
    session.fenced.take(claimed)
    session.fenced.finish(claimed.trial_id, TrialState.WAITING, None, end="lost")
    climb_to_the_top(session, digits, by_number)
    assert by_seed(session) == {0: 5, 1: 3, 2: 3}
    assert answer(session) == 7


def test_recipe_that_failed_gets_no_further_seed_until_it_is_tried_again(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    end_search(session, digits)
    for claimed in leases(session):
        if session.fenced.get_trial(claimed.trial_id).user_attrs["confirms"] == 7:
            fail(session, claimed)
        else:
            finish_with(session, claimed, digits, by_number)
    climb_to_the_top(session, digits, by_number)
    assert by_seed(session) == {0: 5, 1: 3, 2: 3}
    assert answer(session) == 6
    [failed] = retry_failed(session)
    climb_to_the_top(session, digits, by_number)
    assert session.trials()[failed].user_attrs["confirms"] == 7
    assert answer(session) == 7
    assert sorted(standings(session)[0].runs) == [0, 1, 2]


def confirmed_by(session: Session, digits: Data, score: Score) -> dict[str, Any]:
    """What the confirm rung finds when trials end with the values that ``score`` gives them."""
    climb_to_the_top(session, digits, score)
    found = confirmation(session, replace(digits, load_test=None), (METRIC,))
    assert found is not None
    return found


def test_dropping_only_takes_findings_away(make_session: MakeSession, digits: Data) -> None:
    whole = make_session(**SEARCH | {"name": "whole", "ladder": ladder(keep=1.0)})
    halved = make_session(**SEARCH | {"name": "halved"})
    told = []
    for session in (whole, halved):
        found = confirmed_by(session, digits, noisy)
        told.append({row["trial"]: row for row in found["recipes"]})
    assert told[0].keys() == told[1].keys()
    lost = [number for number, row in told[1].items() if row["dropped"]]
    assert len(lost) == 2
    for number, row in told[1].items():
        before = told[0][number]
        assert row["values"] == before["values"][: len(row["values"])]
        if row["dropped"]:
            assert (row["to_plain"], len(row["values"])) == ({}, 1)
        elif row["role"] == "recipe":
            after, all_of_them = (r["to_plain"][METRIC] for r in (row, before))
            assert after["estimate"] == all_of_them["estimate"]
            assert after["p_value"] >= all_of_them["p_value"]


def told(found: dict[str, Any], session: Session) -> tuple[str, str]:
    """What the terminal and the report say of a rung's outcome."""
    session.study.set_user_attr("verdict", {"confirmed": found})
    data = numbers.confirmed_data(session)
    assert data is not None
    return " ".join(confirmed_lines(found, METRIC)), shrinkage(data)


def test_recipes_that_are_better_but_break_the_floor_are_named(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    found = confirmed_by(session, digits, by_number)
    assert not any("break" in text for text in told(found, session)), "nobody breaks it"
    first, *others = [row for row in found["recipes"] if not row["dropped"]]
    first["values"], found["rivals"] = [0.05] * len(first["values"]), []
    for row in others:
        row["keeps_floor"] = False
    [before, *_, last] = (row["trial"] for row in others)
    for text in told(found, session):
        assert f"rials {before}, " in text
        assert f"{last} are better on average, but break the floor." in text
    assert "No other with every seed keeps the floor." in told(found, session)[1]
    others[0]["keeps_floor"] = True
    only = f"tell it from trial {others[0]['trial']}, the only other with every seed that keeps"
    assert only in told(found, session)[1]
    alone = found | {"recipes": [first]}
    assert "No other recipe was trained again." in told(alone, session)[1]
    others[0]["keeps_floor"] = False
    first["keeps_floor"] = False
    assert "No recipe with every seed keeps the floor; this one" in told(found, session)[1]


def test_p_value_of_the_seeds_is_called_one_sided(make_session: MakeSession, digits: Data) -> None:
    session = make_session(**SEARCH)
    found = confirmed_by(session, digits, by_number)
    found["recipes"][0]["to_tuned"] = {
        METRIC: {"estimate": -0.1, "low": -0.2, "high": -0.01, "p_value": 1.0}
    }
    session.study.set_user_attr("verdict", {"confirmed": found})
    data = numbers.confirmed_data(session)
    assert data is not None
    assert "one-sided p = 1.000" in " ".join(confirmed_lines(found, METRIC))
    assert "one-sided p = 1.000" in tuned(data)


def test_report_and_terminal_say_who_was_dropped(
    make_session: MakeSession, digits: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    session = make_session(**SEARCH)
    found = confirmed_by(session, digits, by_number)
    session.study.set_user_attr("verdict", {"confirmed": found})
    data = numbers.confirmed_data(session)
    assert data is not None
    page = "".join(confirmed(data))
    assert page.count("(dropped after 1 of 3 seeds)") == 2
    assert "with every seed that keeps the floor" in page or "do not tell it from" in page
    Console(width=200).print(confirmed_table(found, METRIC))
    assert capsys.readouterr().out.count("(1 of 3 seeds)") == 2
    assert any("does not show them to be worse" in line for line in confirmed_lines(found, METRIC))


def test_floor_that_plain_cross_entropy_breaks_is_said_to_be_unadjusted(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    found = confirmed_by(session, digits, by_number)
    said = "The floor is that of plain cross-entropy, unadjusted"
    assert said not in told(found, session)[0], "nobody breaks it"
    plain = next(row for row in found["recipes"] if row["role"] == "plain")
    plain["keeps_floor"] = False
    assert said in told(found, session)[0]
