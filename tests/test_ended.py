"""What is known of ended trials: the same whether looked at once or one by one, as they end."""

from __future__ import annotations

import random
from datetime import datetime, timedelta
from itertools import count
from typing import Any

import pytest
from conftest import MakeSession
from fleet import claim
from optuna.trial import FrozenTrial, TrialState, create_trial

from tuner import session as sessions
from tuner.ended import Ended, Place, fresh
from tuner.session import Session


def trial(number: int, value: float = 0.5, **attrs: Any) -> FrozenTrial:
    """A complete trial, unless ``state`` says otherwise, that began in the order of numbers."""
    state = attrs.pop("state", TrialState.COMPLETE)
    metrics = {"metrics": {"raw": {"accuracy": value}}}
    made = create_trial(
        state=state,
        value=None if state == TrialState.FAIL else value,
        user_attrs={"digest": f"recipe {number}", **metrics, **attrs},
    )
    made.number = number
    made.datetime_complete = datetime(2026, 1, 1) + timedelta(seconds=100 * value)
    return made


def place(trial: FrozenTrial, baseline: FrozenTrial | None) -> Place:
    """Worse than the baseline counts as breaking the floor; the best value is first."""
    broken = baseline is not None and trial.values[0] < baseline.values[0]
    return broken, -trial.values[0], 0.0, trial.number


def numbers(found: list[FrozenTrial]) -> list[int]:
    return [t.number for t in found]


def many(chance: random.Random) -> list[FrozenTrial]:
    trials = [trial(n, chance.choice([0.2, 0.4, 0.6, 0.8])) for n in range(40)]
    trials[7].user_attrs["baseline"] = True
    for n in (3, 11, 30):
        trials[n] = trial(n, 0.5, state=TrialState.PRUNED, reason="behind")
    for n in (5, 12, 13):
        trials[n] = trial(n, 0.7, state=TrialState.PRUNED, reason="head", fidelity="head")
    return trials


def test_trials_that_end_one_by_one_are_ranked_as_all_at_once() -> None:
    chance = random.Random(0)
    trials = many(chance)
    order = chance.sample(range(40), 40)
    slowly, at_once = Ended(), Ended()
    for so_far in range(1, 41):
        slowly.take_in([trials[n] for n in sorted(order[:so_far])], place)
    at_once.take_in(trials, place)
    judged = [t for t in trials if t.state == TrialState.COMPLETE]
    expected = numbers(sorted(judged, key=lambda t: place(t, trials[7])))
    assert numbers(slowly.complete.trials) == numbers(at_once.complete.trials) == expected
    assert numbers(slowly.of_rung["head"].trials) == [5, 12, 13]
    assert numbers(slowly.apart["full"]) == [3, 11, 30]
    assert slowly.known.keys() == set(range(40))
    assert slowly.baseline is trials[7]


def test_baseline_is_the_one_that_was_complete_first_whoever_looks_when() -> None:
    early, late = trial(5, 0.3, baseline=True), trial(2, 0.6, baseline=True)
    there, beside = Ended(), Ended()
    there.take_in([early], place)
    there.take_in([late, early], place)
    beside.take_in([late, early], place)
    assert there.baseline is beside.baseline is early
    other = Ended()
    other.take_in([late], place)
    other.take_in([late, early], place)
    assert other.baseline is early, "what was written at one moment may be seen one by one"
    assert numbers(other.complete.trials) == numbers(there.complete.trials) == [2, 5]


def test_the_first_trial_of_a_recipe_is_found_but_no_copy_and_not_the_one_that_asks() -> None:
    copy = {"duplicate_of": 4}
    found = Ended()
    later = [trial(n, digest="same", **(copy if n == 2 else {})) for n in (2, 4, 6)]
    found.take_in(later[1:], place)
    found.take_in(later, place)
    assert found.trained("same", "full", apart_from=9) is later[1]
    assert found.trained("same", "full", apart_from=4) is later[2]
    assert found.trained("other", "full", apart_from=4) is None


def test_one_recipe_at_two_rungs_is_two_trainings() -> None:
    found, at_head = Ended(), trial(1, digest="same", fidelity="head")
    found.take_in([at_head], place)
    assert found.trained("same", "full", apart_from=0) is None
    assert found.trained("same", "confirm", apart_from=0) is None
    assert found.trained("same", "head", apart_from=0) is at_head


def test_trials_since_are_counted_by_when_they_ended_not_by_number() -> None:
    ends = [trial(n, value) for n, value in enumerate((0.3, 0.9, 0.1, 0.5, 0.7))]
    ends.append(trial(5, 0.8, duplicate_of=1))
    found = Ended()
    found.take_in(ends, place)
    assert [found.complete_since(t) for t in ends[:5]] == [3, 0, 4, 2, 1]


def test_what_is_new_is_found_wherever_it_stands() -> None:
    trials = [trial(n) for n in range(9)]
    assert numbers(fresh(trials, set(range(9)) - {0, 4, 8})) == [0, 4, 8]
    assert fresh(trials, set(range(9))) == []
    assert numbers(fresh(trials, set())) == list(range(9))


def finish(session: Session, tail: float, overall: float = 0.9) -> None:
    ended = claim(session)
    assert ended is not None
    metrics = {"tail_accuracy": tail, "accuracy": overall, "balanced_accuracy": overall}
    ended.set_user_attr("metrics", {"raw": metrics, "adjusted": metrics})
    session.study.tell(ended, tail)


def test_best_is_the_same_for_who_saw_all_and_who_comes_late(make_session: MakeSession) -> None:
    session = make_session(budget={"trials": 30, "epochs": 3})
    beside = make_session(budget={"trials": 30, "epochs": 3})
    chance = random.Random(1)
    for _ in range(24):
        # Trials that another process ends are seen too.
        finish(chance.choice([session, beside]), chance.random(), chance.choice([0.9, 0.5]))
        late = make_session(budget={"trials": 30, "epochs": 3})
        found = [each.best() for each in (session, beside, late)]
        expected = session.ranked(session.trials(TrialState.COMPLETE))[0]
        assert [t and t.number for t in found] == [expected.number] * 3


def test_end_of_a_trial_looks_at_no_trial_twice(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = count()
    real = Session._place

    def counted(*arguments: Any) -> Place:
        next(looks)
        return real(*arguments)

    monkeypatch.setattr(sessions.Session, "_place", counted)
    session = make_session(budget={"trials": 30, "epochs": 3})
    for _ in range(20):
        finish(session, 0.5)
        session.best()
        session.best_found()
    assert next(looks) == 20
