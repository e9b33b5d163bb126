"""Which trials a study on the ladder has: the rung below first, then who is promoted, honestly."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from climbers import (
    CLIMBING,
    UNIT,
    by_recipe,
    climb_to_the_top,
    end_next,
    fail,
    fail_next,
    finish_with,
    merit,
    opposite,
    timed,
)
from conftest import MakeSession
from fleet import claim, lease
from optuna.trial import FrozenTrial, TrialState

from tuner.climbing import compared, is_over, ladder_lines, promoted, twins
from tuner.datasets import Data
from tuner.doubts import cautions
from tuner.ladder import rung_of
from tuner.planned import at
from tuner.proposals import MOST, PRIOR_BEST, is_blind, proposing
from tuner.tickets import fill_queue, ladder_state, retry_failed

COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED


def kinds(trials: list[FrozenTrial]) -> Counter[str]:
    """How many trials of each kind there are at the last rung."""

    def kind(attrs: dict[str, Any]) -> str:
        for name in ("baseline", "unseen", "promoted_from", "preset"):
            if name in attrs:
                return name
        return "own"

    return Counter(kind(t.user_attrs) for t in trials if rung_of(t) == "full")


def test_nothing_but_the_baseline_is_due_before_it_is_complete(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    assert [t.user_attrs for t in session.trials()] == [{"baseline": True}]
    end_next(session, digits, merit)
    fill_queue(session)
    assert Counter(rung_of(t) for t in session.trials()) == {"full": 1, "head": 40}


def test_whoever_would_wait_for_others_trains_what_is_due_in_any_case(
    make_session: MakeSession, digits: Data
) -> None:
    ladder = {**CLIMBING["ladder"], "rungs": ["head", "full", "confirm"], "confirm": {"plain": 0}}
    session = make_session(**CLIMBING | {"ladder": ladder})
    claimed = [one for one in (lease(session) for _ in range(4)) if one]
    marks = [set(t.user_attrs) for t in session.trials()]
    assert marks == [{"baseline"}, *[{"preset", "compares"}] * 3]
    finish_with(session, claimed[0], digits, merit)
    heads = [lease(session) for _ in range(40)]
    assert {rung_of(t) for t in session.trials()[4:]} == {"head"}
    later = [lease(session) for _ in range(7)]
    assert later[-1] is None
    more = [t.user_attrs for t in session.trials()[44:]]
    assert [attrs.get("preset") for attrs in more[:2]] == ["vector_scaling", "focal"]
    assert [(attrs["confirms"], attrs["fold"]) for attrs in more[2:]] == [(0, i) for i in range(4)]
    for one in [*claimed[1:], *heads, *later]:
        if one is not None:
            finish_with(session, one, digits, merit)
    trials = climb_to_the_top(session, digits, merit)
    assert kinds(trials) == {"baseline": 1, "preset": 5, "promoted_from": 3, "unseen": 7, "own": 5}
    again = [t for t in trials if rung_of(t) == "confirm"]
    pairs = {(t.user_attrs["confirms"], t.user_attrs["fold"]) for t in again}
    assert len(pairs) == len(again), "nothing twice"


def test_a_study_climbs_to_exactly_its_budget(make_session: MakeSession, digits: Data) -> None:
    trials = climb_to_the_top(make_session(**CLIMBING), digits, merit)
    assert Counter(rung_of(t) for t in trials) == {"head": 40, "full": 21}
    assert kinds(trials) == {"baseline": 1, "preset": 5, "promoted_from": 3, "unseen": 7, "own": 5}
    assert {t.state for t in trials if rung_of(t) == "full"} == {COMPLETE}


def test_trials_of_the_rung_below_are_pruned_for_optuna_so_that_its_best_is_ours(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    trials = climb_to_the_top(session, digits, opposite)
    heads = [t for t in trials if rung_of(t) == "head"]
    assert {(t.state, t.user_attrs["reason"]) for t in heads} == {(PRUNED, "head")}
    assert all(t.values == [t.intermediate_values[0]] for t in heads)
    best = session.best()
    assert best is not None
    assert rung_of(best) == "full"
    assert session.study.best_trial.number == best.number


def test_head_tickets_begin_with_a_default_of_every_loss(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    for _ in range(7):
        end_next(session, digits, merit)
    losses = list(session.file.space.parts["loss"])
    heads = [t for t in session.trials(PRUNED) if rung_of(t) == "head"]
    assert [t.user_attrs["preset"] for t in heads] == losses


def test_the_best_of_the_rung_below_are_trained_with_their_loss_and_sampler(
    make_session: MakeSession, digits: Data
) -> None:
    ladder = {**CLIMBING["ladder"], "unseen": 0}
    session = make_session(**CLIMBING | {"ladder": ladder})
    trials = climb_to_the_top(session, digits, merit)
    again = [t for t in trials if "promoted_from" in t.user_attrs]
    origins = [trials[t.user_attrs["promoted_from"]] for t in again]
    defaults = {t.user_attrs["digest"] for t in trials[1:7]}
    assert sorted(t.number for t in origins) == sorted(
        t.number for t in promoted(session, "head", 5, apart=defaults)
    )
    for trial, origin in zip(again, origins, strict=True):
        for part in ("loss", "sampler"):
            assert trial.user_attrs["recipe"][part] == origin.user_attrs["recipe"][part]
        assert trial.user_attrs["recipe"]["optimizer"]["lr"] == 0.1, "the published default"


def test_a_share_tries_what_the_rung_below_cannot_see(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    trials = climb_to_the_top(session, digits, merit)
    free = [t for t in trials if "unseen" in t.user_attrs]
    chosen = {t.number for t in promoted(session, "head", 5)}
    assert {t.user_attrs["promoted_from"] for t in free} == chosen, "each at least once"
    for trial in free:
        origin = trials[trial.user_attrs["promoted_from"]]
        assert origin.params.items() <= trial.params.items()
    assert len({t.params["optimizer.sgd.lr"] for t in free}) == len(free)


def test_the_first_that_try_what_the_rung_below_cannot_see_try_all_of_it(
    make_session: MakeSession, digits: Data
) -> None:
    search, budget = {"algorithm": "tpe"}, {"trials": 41, "epochs": 3}
    session = make_session(**CLIMBING | {"search": search, "budget": budget})
    trials = climb_to_the_top(session, digits, merit)
    rates = [t.params["optimizer.sgd.lr"] for t in trials if "unseen" in t.user_attrs]
    assert len(rates) == 15
    places = [math.log(rate / 0.05) / math.log(10) for rate in rates[:10]]
    assert len({int(5 * place) for place in places}) >= 3, "fifths of the range"
    assert min(places) < 0.3 < 0.7 < max(places), "on both sides of the default"


def test_no_more_than_a_third_of_the_promoted_are_of_one_kind(
    make_session: MakeSession, digits: Data
) -> None:
    def smooth(attempt: Any) -> float:
        return 0.9 if attempt.user_attrs["loss"] == "label_smoothing" else merit(attempt) / 2

    session = make_session(**CLIMBING)
    while len(at(session, "full")) < 2:
        end_next(session, digits, smooth)
    chosen = promoted(session, "head", 6)
    of_kind = Counter((t.user_attrs["loss"], t.user_attrs["sampler"]) for t in chosen)
    assert max(of_kind.values()) <= 2
    assert chosen[0].user_attrs["loss"] == "label_smoothing"
    assert len({t.user_attrs["digest"] for t in chosen}) == 6, "no recipe twice"


def test_trials_that_break_the_floor_are_promoted_last(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    end_next(session, digits, merit, overall=0.9)
    for _ in range(20):
        end_next(session, digits, lambda _: 1.0, overall=0.2)
    for _ in range(20):
        end_next(session, digits, merit, overall=0.9)
    assert all(t.number > 20 for t in promoted(session, "head", 5))


def test_a_rung_that_ranks_otherwise_is_not_followed_and_that_is_said(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    trials = climb_to_the_top(session, digits, opposite)
    found = compared(session, "head", "full")
    assert found.correlation is not None
    assert found.correlation < -0.5
    assert kinds(trials) == {"baseline": 1, "preset": 5, "promoted_from": 3, "own": 12}
    assert "too low to follow" in str(ladder_state(session))
    assert Counter(rung_of(t) for t in trials) == {"head": 40, "full": 21}, "the budget stays"


def test_a_rung_that_was_followed_though_it_ranks_otherwise_is_said_to_be(
    make_session: MakeSession, digits: Data
) -> None:
    rungs = {"rungs": ["head", "deferred", "full"], "head": {"trials": 40}, "promoted": 0.8}
    losses: dict[str, Any] = {"loss": {"cross_entropy": {}, "balanced_softmax": {}}}
    small = {"ladder": rungs | {"deferred": {"trials": 7}}, "space": CLIMBING["space"] | losses}
    session = make_session(**CLIMBING | small)
    climb_to_the_top(session, digits, lambda a: abs(merit(a) - (rung_of(a) != "head")))
    said = next(line for line in ladder_lines(session) if line.startswith("head and deferred"))
    assert "rank 7 recipes with correlation -1.00" in said
    assert said.endswith("; followed, as 4 recipes were too few or too alike to say before")


def test_small_study_promotes_as_many_as_it_takes_to_compare_the_rungs(
    make_session: MakeSession, digits: Data
) -> None:
    losses = CLIMBING["space"]["loss"]
    few = {name: losses[name] for name in ("cross_entropy", "balanced_softmax", "focal")}
    space = {**CLIMBING["space"], "loss": few}
    session = make_session(**CLIMBING | {"space": space, "budget": {"trials": 12, "epochs": 3}})
    trials = climb_to_the_top(session, digits, merit)
    found = compared(session, "head", "full", decisive=True)
    assert len(found.pairs) == 6
    assert found.correlation is not None
    assert Counter(rung_of(t) for t in trials) == {"head": 40, "full": 12}


def test_default_that_is_among_the_best_is_not_trained_again_to_compare_the_rungs(
    make_session: MakeSession, digits: Data
) -> None:
    def plain(attempt: Any) -> float:
        return 0.9 if "preset" in attempt.user_attrs else merit(attempt) / 2

    session = make_session(**CLIMBING)
    trials = climb_to_the_top(session, digits, plain)
    first = [t for t in trials if "promoted_from" in t.user_attrs and "unseen" not in t.user_attrs]
    assert first
    assert not any("preset" in trials[t.user_attrs["promoted_from"]].user_attrs for t in first)
    assert any(
        "preset" in trials[t.user_attrs["promoted_from"]].user_attrs
        for t in trials
        if "unseen" in t.user_attrs
    ), "what the rung below could not see of it is tried"
    uppers = [upper.user_attrs["digest"] for _, upper in twins(session, "head", "full")]
    assert len(set(uppers)) == len(uppers)


def test_head_rung_proposes_by_tpe_where_a_gaussian_process_would_take_longer_than_its_trials(
    make_session: MakeSession,
) -> None:
    session = make_session(**CLIMBING | {"search": {"algorithm": "gp"}})
    samplers = [proposing(session, rung, 7).sampler for rung in ("head", "full")]
    assert [type(sampler).__name__ for sampler in samplers] == ["CohortTPESampler", "GPSampler"]


@pytest.mark.parametrize(("seconds", "is_dear"), [(0.1, False), (10.0, True)])
def test_study_whose_head_rung_took_longer_than_its_trainings_says_so(
    make_session: MakeSession, digits: Data, seconds: float, is_dear: bool
) -> None:
    def said() -> bool:
        return any("the head rung took" in line for line in cautions(session))

    session = make_session(**CLIMBING)
    while len(at(session, "full")) < 2:
        end_next(session, digits, timed(seconds))
    assert not said(), "the full rung is not over"
    climb_to_the_top(session, digits, timed(seconds))
    assert said() == is_dear


def test_what_decides_is_trained_on_both_rungs_before_the_decision(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    while len(at(session, "full")) < 2:
        end_next(session, digits, merit)
    fill_queue(session)
    own = [t.user_attrs for t in at(session, "full")[1:]]
    assert all("compares" in attrs for attrs in own)
    assert len(own) == 3 + 5
    trials = climb_to_the_top(session, digits, merit)
    pairs = compared(session, "head", "full", decisive=True).pairs
    assert len(pairs) == 1 + 5 + 3, "the baseline, the defaults, half of the promoted"
    assert all(lower == upper for lower, upper in pairs)
    assert compared(session, "head", "full").pairs == pairs, "with others open they are others"
    assert len(trials) == 61


@pytest.mark.parametrize(
    ("trainings", "promoted_as"),
    [
        ({"single_stage": {}, "deferred": {"switch": {"low": 0.5, "high": 0.9}}}, 0.8),
        ({"single_stage": {}, "deferred": {"switch": [0.6, 0.8]}}, 0.8),
        ({"deferred": {"switch": 0.9}}, 0.9),
        ({"single_stage": {}}, None),
    ],
)
def test_what_acts_late_at_the_rung_below_acts_late_above_where_that_is_searched(
    make_session: MakeSession, digits: Data, trainings: dict[str, Any], promoted_as: float | None
) -> None:
    ladder = {"rungs": ["deferred", "full"], "deferred": {"trials": 12}}
    space = CLIMBING["space"] | {"training": trainings}
    session = make_session(**CLIMBING | {"ladder": ladder, "space": space, "training": None})
    trials = climb_to_the_top(session, digits, merit)
    above = [t for t in trials if "promoted_from" in t.user_attrs]
    assert len(above) == 10
    found = [t.user_attrs["recipe"]["training"] for t in above]
    assert {training.get("switch") for training in found} == {promoted_as}


def test_what_is_one_and_the_same_training_at_two_rungs_says_nothing_of_how_they_rank(
    make_session: MakeSession, digits: Data
) -> None:
    ladder = {"rungs": ["deferred", "full"], "deferred": {"trials": 12}}
    space = CLIMBING["space"] | {"training": {"single_stage": {}, "deferred": {"switch": 0.8}}}
    session = make_session(**CLIMBING | {"ladder": ladder, "space": space, "training": None})
    trials = climb_to_the_top(session, digits, merit)
    below = {t.user_attrs["digest"] for t in trials if rung_of(t) == "deferred"}
    alike = [t for t in at(session, "full") if t.user_attrs["digest"] in below]
    assert any("promoted_from" in t.user_attrs for t in alike)
    compared_ones = {upper.number for _, upper in twins(session, "deferred", "full")}
    assert not compared_ones & {t.number for t in alike}
    assert len(compared_ones) == 5, "the defaults of all losses but plain cross-entropy"


def test_all_three_rungs_are_climbed(make_session: MakeSession, digits: Data) -> None:
    budgets = {"head": {"trials": 30}, "deferred": {"trials": 12}}
    ladder = {"rungs": ["head", "deferred", "full"], **budgets}
    session = make_session(**CLIMBING | {"ladder": ladder})
    trials = climb_to_the_top(session, digits, merit)
    assert Counter(rung_of(t) for t in trials) == {"head": 30, "deferred": 12, "full": 21}
    deferred = [t for t in trials if rung_of(t) == "deferred"]
    assert {(t.state, t.user_attrs["reason"]) for t in deferred} == {(PRUNED, "deferred")}
    origins = {t.user_attrs["promoted_from"] for t in deferred if "promoted_from" in t.user_attrs}
    assert {rung_of(trials[number]) for number in origins} == {"head"}
    lines = ladder_lines(session)
    assert lines[0] == "head 30 of 30 trials"
    assert lines[1] == "deferred 12 of 12 trials"
    assert lines[2].startswith("head and deferred rank")
    assert lines[4].startswith("deferred and full rank")


def test_one_cheap_rung_alone_gives_the_answer(make_session: MakeSession, digits: Data) -> None:
    session = make_session(**CLIMBING | {"ladder": {"rungs": ["head"]}})
    trials = climb_to_the_top(session, digits, merit)
    assert Counter(rung_of(t) for t in trials) == {"full": 1, "head": 21}
    assert {t.state for t in trials} == {COMPLETE}
    best = session.best()
    assert best is not None
    assert best.value == max(t.value or 0 for t in trials)


def test_a_baseline_in_vain_is_tried_again_and_nothing_is_built_on_it(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    for _ in range(3):
        fail_next(session)
    assert lease(session) is None
    assert {rung_of(t) for t in session.trials()} == {"full"}


def reversed_merit(attempt: Any) -> float:
    """The other way round than ``merit``, at every rung."""
    return 1 - merit(attempt)


@pytest.mark.parametrize("sampler", ["class_aware", "natural"])
def test_default_of_cross_entropy_is_compared_with_itself_and_not_with_another_baseline(
    sampler: str, make_session: MakeSession, digits: Data
) -> None:
    own = {sampler: {"exponent": UNIT} if sampler == "class_aware" else {}}
    session = make_session(**CLIMBING | {"space": CLIMBING["space"] | {"sampler": own}})
    trials = climb_to_the_top(session, digits, merit)
    pairs = twins(session, "head", "full")
    for lower, upper in pairs:
        one, other = (t.user_attrs["recipe"] for t in (lower, upper))
        assert (one["loss"], one["sampler"]) == (other["loss"], other["sampler"])
    default = next(t for t in trials if t.user_attrs.get("preset") == "cross_entropy")
    above = next(upper for lower, upper in pairs if lower.number == default.number)
    assert bool(above.user_attrs.get("baseline")) == (sampler == "natural")
    assert Counter(rung_of(t) for t in trials) == {"head": 40, "full": 21}


@pytest.mark.parametrize(("before", "after"), [(merit, merit), (merit, reversed_merit)])
@pytest.mark.parametrize("trials", [25, 31, 41, 83])
def test_a_larger_budget_is_met_exactly_whatever_it_changes_in_what_is_promoted(
    before: Any, after: Any, trials: int, make_session: MakeSession, digits: Data
) -> None:
    strict = CLIMBING | {"ladder": {**CLIMBING["ladder"], "trust": 0.9}}
    climb_to_the_top(make_session(**strict), digits, before)
    larger = make_session(**strict | {"budget": {"trials": trials, "epochs": 3}})
    ended = climb_to_the_top(larger, digits, after)
    assert Counter(rung_of(t) for t in ended) == {"head": 40, "full": trials}


def test_trials_that_failed_and_are_tried_again_compare_the_rungs(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    while len(at(session, "full")) < 2:
        end_next(session, digits, merit)
    fill_queue(session)
    for claimed in iter(lambda: lease(session), None):
        assert "compares" in session.trials()[claimed.number].user_attrs
        fail(session, claimed)
        if claimed.number == 48:
            break
    assert len(retry_failed(session)) == 7
    again = list(iter(lambda: lease(session), None))
    assert all("compares" in session.trials()[c.number].user_attrs for c in again)
    assert fill_queue(session) == 0, "what decides is tried again: the decision waits"
    for claimed in again:
        finish_with(session, claimed, digits, merit)
    assert len(compared(session, "head", "full", decisive=True).pairs) == 9
    trials = climb_to_the_top(session, digits, merit)
    assert Counter(rung_of(t) for t in at(session, "full")) == {"full": 21}
    assert len(trials) == 61 + 7


def test_recipe_that_failed_below_and_was_tried_again_is_promoted(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING)
    for _ in range(20):
        end_next(session, digits, merit)
    fail_next(session)
    for _ in range(20):
        end_next(session, digits, merit)
    assert is_over(session, "head")
    retry_failed(session)
    assert not is_over(session, "head"), "it is tried again"
    found = end_next(session, digits, lambda _: 1.0)
    assert is_over(session, "head")
    assert promoted(session, "head", 5)[0].number == found


def test_a_larger_budget_goes_on_from_the_top(make_session: MakeSession, digits: Data) -> None:
    climb_to_the_top(make_session(**CLIMBING), digits, merit)
    larger = make_session(**CLIMBING | {"budget": {"trials": 31, "epochs": 3}})
    trials = climb_to_the_top(larger, digits, merit)
    assert Counter(rung_of(t) for t in trials) == {"head": 40, "full": 31}


def test_the_algorithm_sees_the_rung_it_proposes_for_and_a_prior_from_below(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING | {"search": {"algorithm": "tpe"}})
    climb_to_the_top(session, digits, merit)
    heads = proposing(session, "head", 99).get_trials(deepcopy=False)
    assert {rung_of(t) for t in heads} == {"head"}
    assert {t.state for t in heads} == {COMPLETE}, "for the algorithm they came to their end"
    whole = proposing(session, "full", 99).get_trials(deepcopy=False)
    own = [t for t in whole if rung_of(t) == "full"]
    assert [t.number for t in own] == [t.number for t in at(session, "full")]
    prior = [t for t in whole if rung_of(t) == "head"]
    ranked = session.ended().of_rung["head"].trials
    best, rest = ranked[:PRIOR_BEST], ranked[PRIOR_BEST:]
    assert [t.number for t in prior] == sorted(
        t.number for t in (*best, *(t for t in rest if is_blind(t.number)))
    )
    alike = {t.number: t.values for t in session.trials()}
    assert all(abs(t.values[0] - alike[t.number][0]) < 1e-9 for t in prior), "both rungs agree"


def test_a_rung_that_is_not_followed_gives_no_prior(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**CLIMBING | {"search": {"algorithm": "tpe"}})
    climb_to_the_top(session, digits, opposite)
    seen = proposing(session, "full", 99).get_trials(deepcopy=False)
    assert {rung_of(t) for t in seen} == {"full"}


def test_what_a_proposal_learns_from_is_capped(make_session: MakeSession, digits: Data) -> None:
    most = MOST["head"]
    ladder = {"rungs": ["head", "full"], "head": {"trials": most + 60}}
    session = make_session(**CLIMBING | {"ladder": ladder})
    for _ in range(most + 50):
        end_next(session, digits, merit)
    seen = proposing(session, "head", 1).get_trials(deepcopy=False, states=(COMPLETE,))
    assert len(seen) == most
    best = session.ranked(t for t in session.trials() if rung_of(t) == "head")[:50]
    assert {t.number for t in best} <= {t.number for t in seen}


def test_a_long_search_learns_from_the_best_and_an_even_choice_of_the_others(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"ladder": {"rungs": ["full"]}, "budget": {"trials": 40, "epochs": 3}}
    session = make_session(**CLIMBING | search)
    for _ in range(24):
        end_next(session, digits, by_recipe)
    for _ in range(8):
        given_up = claim(session)
        assert given_up is not None
        given_up.report(0.0, step=0)
        session.study.tell(given_up, state=PRUNED)
    assert proposing(session, "full", 99) is session.study, "plain Optuna"
    monkeypatch.setitem(MOST, "full", 16)
    seen = proposing(session, "full", 99).get_trials(deepcopy=False)
    ended = [t for t in seen if t.state.is_finished()]
    assert len(ended) == 16
    best = session.ranked(session.trials())[:4]
    assert {t.number for t in best} <= {t.number for t in ended}
    assert [t.state for t in ended].count(PRUNED) == 4, "of 28 others, 8 were pruned"
