"""The confirm rung: the best recipes again, with fresh seeds, other images, and no luck kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from climbers import CLIMBING, climb_to_the_top, end_next, fail_next, merit
from conftest import MakeFile, MakeSession
from fleet import lease, run_next
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from tuner import artifacts, confirmation, verdict
from tuner.card import model_card
from tuner.cli import finish, read
from tuner.cli.confirmed import confirmed_lines, confirmed_table
from tuner.confirm import against, contenders, standings
from tuner.datasets import Data, fold
from tuner.errors import StorageError, StudyFileError
from tuner.export import collect_metrics, find_trial
from tuner.ladder import rung_of
from tuner.report import data as numbers
from tuner.report import report_html
from tuner.report.confirmed import confirmed_figure
from tuner.rounds import confirm_lines, is_decided, winner
from tuner.rungs.attempt import Attempt
from tuner.session import Session
from tuner.tickets import fill_queue, ladder_state, retry_failed
from tuner.trained import trained_lane
from tuner.trainer import epochs
from tuner.worker import work

CONFIRM: dict[str, Any] = {
    "rungs": ["full", "confirm"],
    "confirm": {"recipes": 3, "seeds": 2, "keep": 1.0, "plain": 0},
}
SEARCH: dict[str, Any] = {**CLIMBING, "ladder": CONFIRM, "budget": {"trials": 8, "epochs": 3}}
Value = Callable[[Attempt], float]


def of_rung(session: Session) -> list[FrozenTrial]:
    return [trial for trial in session.trials() if rung_of(trial) == "confirm"]


def lucky(attempt: Attempt) -> float:
    """The search's best was luck: with fresh seeds its recipe is worse than all others."""
    if rung_of(attempt) == "full":
        return attempt.number / 10
    return 0.0 if attempt.user_attrs["confirms"] == 7 else 0.6


def test_recipes_wait_until_the_search_is_over(make_session: MakeSession, digits: Data) -> None:
    session = make_session(**SEARCH)
    for _ in range(8):
        assert not of_rung(session)
        assert not is_decided(session)
        end_next(session, digits, merit)
    fill_queue(session)
    assert len(of_rung(session)) == len(contenders(session)) == 4, "with the first seed"


def test_best_recipes_and_plain_cross_entropy_are_trained_once_per_seed(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    climb_to_the_top(session, digits, merit)
    roles = contenders(session)
    pairs = Counter((t.user_attrs["confirms"], t.user_attrs["fold"]) for t in of_rung(session))
    assert pairs == {(number, index): 1 for number in roles for index in (0, 1)}
    ranked = [t.number for t in session.ranked(session.trials(TrialState.COMPLETE))]
    others = [n for n in ranked if roles.get(n) in (None, "recipe")]
    assert [n for n in others if n in roles] == others[:3]
    assert roles[0] == "plain"


def test_the_best_tuned_plain_cross_entropy_is_beside_them(
    make_session: MakeSession, digits: Data
) -> None:
    space = {**CLIMBING["space"], "loss": {"cross_entropy": {}}, "sampler": {"natural": {}}}
    session = make_session(**SEARCH | {"space": space})
    climb_to_the_top(session, digits, lambda attempt: attempt.number / 10)
    assert contenders(session) == {0: "plain", 7: "tuned", 6: "recipe", 5: "recipe", 4: "recipe"}


def test_recipes_that_are_alike_are_confirmed_once(make_session: MakeSession, digits: Data) -> None:
    space = {"loss": {"focal": {"gamma": [1.0, 2.0]}, "cross_entropy": {}, "balanced_softmax": {}}}
    session = make_session(**SEARCH | {"space": space})
    trials = climb_to_the_top(session, digits, lambda attempt: attempt.number / 10)
    digests = [trials[number].user_attrs["digest"] for number in contenders(session)]
    assert len(digests) == len(set(digests)) < 5
    best = session.best_found()
    assert best is not None
    assert best.number in contenders(session)


def test_seeds_are_fresh_and_shared_and_nothing_else_of_a_recipe_changes(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    trials = climb_to_the_top(session, digits, merit)
    seeds: dict[int, set[int]] = {0: set(), 1: set()}
    for trial in of_rung(session):
        recipe = dict(trial.user_attrs["recipe"])
        origin = dict(trials[trial.user_attrs["confirms"]].user_attrs["recipe"])
        seeds[trial.user_attrs["fold"]].add(recipe.pop("seed"))
        assert origin.pop("seed") not in seeds[trial.user_attrs["fold"]]
        assert recipe == origin
    assert [len(found) for found in seeds.values()] == [1, 1]
    assert seeds[0] != seeds[1]


def test_optunas_best_trial_stays_one_of_the_search(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    climb_to_the_top(session, digits, lambda a: 1.0 if rung_of(a) == "confirm" else merit(a))
    assert {t.state for t in of_rung(session)} == {TrialState.PRUNED}
    assert rung_of(session.study.best_trial) == "full"


def test_recipe_that_was_lucky_in_the_search_is_not_the_answer(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    climb_to_the_top(session, digits, lucky)
    found, best = session.best_found(), session.best()
    assert found is not None
    assert best is not None
    assert (found.number, best.number) == (7, 6)
    assert standings(session)[0].objective() == {0: 0.6, 1: 0.6}


def test_the_answer_is_that_of_the_search_until_the_rung_is_over(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    for _ in range(8 + 7):
        end_next(session, digits, lucky)
        assert winner(session) is None
    told = "plain cross-entropy was tuned with 1 of 8 trials"
    assert confirm_lines(session) == [told, "confirm 7 of at most 10 trials"]
    end_next(session, digits, lucky)
    assert [t.number for t in (session.best(), winner(session)) if t is not None] == [6, 6]
    assert confirm_lines(session) == [
        told,
        "confirm 8 of 8 trials",
        "trial 6: 0.6000 ± 0.0000 with 2 fresh seeds, 0.6000 in the search",
    ]


def test_value_of_the_answer_is_that_with_fresh_seeds(
    make_session: MakeSession,
    digits: Data,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    session = make_session(**SEARCH)
    monkeypatch.setattr(read, "joined", lambda *_, **__: session)
    for _ in range(8 + 7):
        end_next(session, digits, lambda a: 0.1 * lucky(a))
    read.status("climbing")
    read.best("climbing")
    assert capsys.readouterr().out.count("rial 7") == 2, "that of the search"
    end_next(session, digits, lambda a: 0.1 * lucky(a))
    read.status("climbing")
    read.best("climbing")
    shown = capsys.readouterr().out
    assert "best trial 6 0.0600 with 2 fresh seeds (0.0600 in the search)" in shown
    assert "trial 6: tail_accuracy 0.0600 with 2 fresh seeds (0.0600 in the search)" in shown


def test_recipe_that_fails_with_a_seed_is_not_the_answer(
    make_session: MakeSession, digits: Data
) -> None:
    def failing(attempt: Attempt) -> float:
        if attempt.user_attrs.get("confirms") == 7 and attempt.user_attrs["fold"] == 1:
            raise FloatingPointError
        return attempt.number / 10 if rung_of(attempt) == "full" else 0.9

    session = make_session(**SEARCH)
    for _ in range(8 + 8):
        try:
            end_next(session, digits, failing)
        except FloatingPointError:
            [lost] = [t for t in of_rung(session) if t.state == TrialState.RUNNING]
            held = session.fenced.held[lost._trial_id]
            session.fenced.set_trial_user_attr(lost._trial_id, "reason", "not_finite")
            session.fenced.finish(held.lease.trial_id, TrialState.PRUNED, None, end="pruned")
    assert is_decided(session)
    best = winner(session)
    assert best is not None
    assert best.number == 6
    assert standings(session)[-1].trial.number == 7, "without all seeds it comes last"


def test_failed_training_that_is_retried_counts_for_its_seed(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    for _ in range(8):
        end_next(session, digits, lucky)
    fail_next(session)
    lost = of_rung(session)[0]
    while end_next(session, digits, lucky) is not None:
        pass
    origin = lost.user_attrs["confirms"]
    assert [sorted(s.runs) for s in standings(session) if s.trial.number == origin] == [[1]]
    assert retry_failed(session) == [lost.number]
    end_next(session, digits, lucky)
    assert all(sorted(s.runs) == [0, 1] for s in standings(session))


def test_verdict_is_made_anew_when_a_training_that_failed_was_tried_again(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session(**SEARCH)
    for _ in range(8):
        end_next(session, digits, lucky)
    fail_next(session)
    climb_to_the_top(session, digits, lucky)
    best = session.best()
    assert best is not None
    compared = {"best": best.number, "baseline": 0, "rows": []}
    monkeypatch.setattr(verdict, "_compare", lambda *_: dict(compared))
    monkeypatch.setattr(verdict, "COMPARED", ("tail_accuracy",))
    monkeypatch.setattr(confirmation, "_on_test", lambda *_: [])

    def values() -> list[float | None]:
        found = verdict.decide(session, digits)
        assert found is not None
        (plain,) = (row for row in found["confirmed"]["recipes"] if row["role"] == "plain")
        own: list[float | None] = plain["values"]
        return own

    assert values() == [None, 0.6]
    retry_failed(session)
    end_next(session, digits, lucky)
    assert values() == [0.6, 0.6]


def test_plain_cross_entropy_with_one_seed_left_is_not_told_from_the_answer(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spread(attempt: Attempt) -> float:
        number: int = attempt.user_attrs.get("confirms", attempt.number)
        fold: int = attempt.user_attrs.get("fold", 0)
        return 0.1 * number + 0.01 * number * fold

    monkeypatch.setattr(confirmation, "_on_test", lambda *_: [])
    session = make_session(**SEARCH)
    for _ in range(8):
        end_next(session, digits, spread)
    fail_next(session)
    climb_to_the_top(session, digits, spread)
    found = confirmation.confirmation(session, digits, ["tail_accuracy"])
    assert found is not None
    plain = next(row for row in found["recipes"] if row["role"] == "plain")
    assert plain["values"].count(None) == 1
    assert plain["trial"] in found["rivals"]


def test_floor_is_that_of_plain_cross_entropy_with_the_same_seed(
    make_session: MakeSession, digits: Data
) -> None:
    floor = {"objective": {"metric": "tail_accuracy", "floor": {"metric": "accuracy", "drop": 0.1}}}
    session = make_session(**SEARCH | floor)
    for _ in range(8):
        end_next(session, digits, lambda a: a.number / 10)
    fill_queue(session)
    # With fresh seeds everything has 0.5, plain cross-entropy too: nothing breaks the floor.
    while end_next(session, digits, lucky, overall=0.5) is not None:
        pass
    best = session.best()
    assert best is not None
    assert best.number == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ladder": {"rungs": ["confirm"]}}, "name full before it"),
        ({"ladder": {"rungs": ["head", "confirm"]}}, "name full before it"),
        ({"ladder": {"rungs": ["confirm", "full"]}}, "in this order"),
        ({"ladder": CONFIRM, "budget": {"trials": 5, "epochs": 2, "target": 0.9}}, "budget.target"),
        ({"ladder": CONFIRM, "budget": {"trials": 5, "epochs": 2, "plateau": 9}}, "budget.plateau"),
        ({"ladder": {**CONFIRM, "confirm": {"seeds": 1}}}, "confirm.seeds"),
    ],
)
def test_rung_that_cannot_be_reached_is_refused(
    make_file: MakeFile, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(StudyFileError, match=said):
        make_file(**SEARCH | changes)


@pytest.mark.parametrize(
    "search", [{"algorithm": "grid"}, {"algorithm": "random"}, {"algorithm": "tpe"}]
)
def test_every_algorithm_can_be_confirmed(
    make_session: MakeSession, digits: Data, search: dict[str, Any]
) -> None:
    space = {"loss": {"cross_entropy": {}, "focal": {"gamma": [0.5, 1.0, 2.0]}}}
    budget = {"epochs": 2} | ({} if search["algorithm"] == "grid" else {"trials": 5})
    session = make_session(**SEARCH | {"search": search, "space": space, "budget": budget})
    climb_to_the_top(session, digits, merit)
    assert winner(session) is not None
    assert ladder_state(session)[1].startswith("confirm ")


@pytest.fixture
def trained(make_session: MakeSession, digits: Data, sqlite: str) -> Session:
    """A small study that was trained to its end, and confirmed."""
    session = make_session(
        budget={"trials": 4, "epochs": 3},
        ladder={"rungs": ["full", "confirm"], "confirm": {"recipes": 2, "seeds": 2}},
    )
    work(session, digits)
    assert is_decided(session)
    return session


def test_a_training_of_the_rung_is_that_of_its_recipe_on_other_validation_images(
    trained: Session, digits: Data
) -> None:
    run = of_rung(trained)[-1]
    stored = artifacts.load_validation(trained.trial_store(run.number))
    assert stored is not None
    data = fold(digits, run.user_attrs["fold"])
    assert stored["targets"].equal(data.validation.targets)
    lane = trained_lane(trained, run, digits, "cpu")
    assert lane.logits(data.validation.images).half().float().equal(stored["logits"])
    *_, last = epochs(lane.recipe, data)
    assert last.logits.half().float().equal(stored["logits"])


def test_lost_weights_of_a_training_are_made_again_on_its_own_images(
    trained: Session, digits: Data
) -> None:
    run = of_rung(trained)[-1]
    before = trained_lane(trained, run, digits, "cpu").logits(digits.validation.images)
    trained.trial_store(run.number).remove(artifacts.WEIGHTS)
    again = trained_lane(trained, run, digits, "cpu").logits(digits.validation.images)
    assert again.equal(before)


def test_what_is_exported_is_the_recipe_and_not_one_of_its_trainings(trained: Session) -> None:
    run = of_rung(trained)[0]
    origin = run.user_attrs["confirms"]
    with pytest.raises(StorageError, match=f"--trial {origin}"):
        find_trial(trained, run.number)


def test_verdict_shows_what_the_search_saw_and_what_fresh_seeds_give(
    trained: Session, digits: Data
) -> None:
    found = verdict.decide(trained, digits)
    assert found is not None
    told, best = found["confirmed"], trained.best()
    assert best is not None
    assert (told["seeds"], told["other_images"], found["best"]) == (2, True, best.number)
    by_number = {t.number: t for t in trained.trials()}
    for row in told["recipes"]:
        runs = {
            t.user_attrs["fold"]: t
            for t in of_rung(trained)
            if t.user_attrs["confirms"] == row["trial"]
        }
        assert row["values"] == [runs[0].values[0], runs[1].values[0]]
        assert row["search"] == by_number[row["trial"]].values[0]
    assert told["recipes"][0]["trial"] == best.number


def test_test_part_is_looked_at_for_the_answer_and_plain_cross_entropy_alone(
    trained: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []

    def seen(session: Session, trial: FrozenTrial, data: Data, device: str) -> Any:
        looked.append(trial.user_attrs["confirms"])
        return trained_lane(session, trial, data, device)

    monkeypatch.setattr(confirmation, "trained_lane", seen)
    found = verdict.decide(trained, digits)
    assert found is not None
    roles = {row["trial"]: row["role"] for row in found["confirmed"]["recipes"]}
    wanted = {n for n, role in roles.items() if role != "recipe"} | {found["best"]}
    assert Counter(looked) == dict.fromkeys(wanted, 2)
    assert {each["trial"] for each in found["confirmed"]["test"]} == wanted


def test_weights_of_what_is_not_the_answer_are_dropped_with_the_verdict(
    trained: Session, digits: Data
) -> None:
    def kept() -> set[int]:
        keys = trained.store.keys("trial-")
        return {int(k[6:11]) for k in keys if k.endswith(artifacts.WEIGHTS)}

    before = kept()
    assert {t.number for t in of_rung(trained)} <= before
    found = verdict.decide(trained, digits)
    assert found is not None
    assert kept() == {found["best"], found["baseline"]}


def test_card_tells_the_spread_over_seeds_instead_of_that_there_was_one(
    trained: Session, digits: Data
) -> None:
    found, best = verdict.decide(trained, digits), trained.best()
    assert best is not None
    metrics = collect_metrics(trained, best, best.user_attrs, digits, found)
    card = model_card(trained, best, digits, metrics)
    assert "## adjusted tail_accuracy with 2 fresh seeds and other validation images" in card
    assert "One training with one seed" not in card


def test_card_says_that_a_recipe_breaks_the_floor(
    trained: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, best = verdict.decide(trained, digits), trained.best()
    assert best is not None
    metrics = collect_metrics(trained, best, best.user_attrs, digits, found)
    for keeps in (True, False):
        monkeypatch.setattr(Session, "keeps_floor", lambda *_, keeps=keeps: keeps)
        card = model_card(trained, best, digits, metrics)
        assert ("In the search it broke the floor: " in card) == (not keeps)


def test_history_in_the_report_names_the_best_of_the_search(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**SEARCH)
    climb_to_the_top(session, digits, lucky)
    assert numbers.history_data(session).best == 7, "the confirm rung chose 6"


def test_differences_to_plain_cross_entropy_are_paired_by_seed(trained: Session) -> None:
    first, *others = standings(trained)
    other = others[-1]
    found = against(trained, first, other, names=["balanced_accuracy"])["balanced_accuracy"]
    a, b = (each.metric("balanced_accuracy", adjusted=True) for each in (first, other))
    assert found.estimate == pytest.approx(sum(a[i] - b[i] for i in (0, 1)) / 2)
    assert found.interval.low <= found.estimate <= found.interval.high


def test_smaller_is_better_where_the_metric_is_a_loss(trained: Session) -> None:
    one, other, *_ = standings(trained)
    found = against(trained, one, other, names=["nll"])["nll"]
    turned = against(trained, other, one, names=["nll"])["nll"]
    better, worse = sorted((found, turned), key=lambda difference: difference.estimate)
    assert better.estimate == pytest.approx(-worse.estimate)
    assert better.p_value < 0.5 < worse.p_value
    assert better.interval.low < better.estimate < better.interval.high


@pytest.fixture
def searched(make_session: MakeSession, digits: Data, sqlite: str) -> Session:
    """A small study whose search is over, and its confirm rung not begun."""
    session = make_session(
        budget={"trials": 3, "epochs": 2},
        ladder={"rungs": ["full", "confirm"], "confirm": {"recipes": 1, "seeds": 2}},
    )
    for _ in range(3):
        run_next(session, digits)
    fill_queue(session)
    return session


def test_nothing_is_confirmed_where_every_recipe_failed_with_a_seed(
    searched: Session,
    digits: Data,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    while (held := lease(searched)) is not None:
        searched.fenced.take(held)
        searched.fenced.finish(held.trial_id, TrialState.PRUNED, None, end="pruned")
    found, best = verdict.decide(searched, digits), searched.best_found()
    assert is_decided(searched)
    assert found is not None
    assert best is not None
    assert (found["confirmed"], found["best"]) == (None, best.number)
    monkeypatch.setattr(verdict, "_compare", lambda *_: pytest.fail("looked again"))
    assert verdict.decide(searched, digits) == found
    options = {"storage": None, "artifacts": None, "data": None}
    finish.finish(searched, digits, "cpu", tmp_path, options)
    assert "has no answer, as all recipes failed there" in capsys.readouterr().out


def test_a_verdict_before_the_rung_is_over_keeps_the_weights_it_needs(
    searched: Session, digits: Data
) -> None:
    run_next(searched, digits)
    before = searched.store.keys("trial-")
    assert sum(key.endswith(artifacts.WEIGHTS) for key in before) > 2
    found = verdict.decide(searched, digits)
    assert found is not None
    assert found["confirmed"] is None
    assert searched.store.keys("trial-") == before


def test_report_shows_what_luck_gave(trained: Session, digits: Data) -> None:
    assert numbers.confirmed_data(trained) is None, "nothing was compared yet"
    verdict.decide(trained, digits)
    data, best = numbers.confirmed_data(trained), trained.best()
    assert data is not None
    assert best is not None
    first = data.recipes[0]
    assert (first.trial, first.search) == (best.number, best.values[0])
    assert first.fresh.mean == pytest.approx(sum(first.fresh.values) / 2)
    assert all((r.test is None) == (r.role == "recipe" and r is not first) for r in data.recipes)
    page = report_html(trained)
    assert "<h2>Confirmed</h2>" in page
    figure = confirmed_figure(data)
    drawn = {trace.name: len(trace.x) for trace in figure.data}
    looked_at = sum(r.test is not None for r in data.recipes)
    assert drawn == {
        "fresh seeds": 2 * len(data.recipes),
        "fresh seeds, test part": 2 * looked_at,
        "in the search": len(data.recipes),
    }


def test_terminal_shows_the_table_and_what_it_does_not_tell(
    trained: Session, digits: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verdict.decide(trained, digits)
    assert found is not None
    Console(width=80).print(confirmed_table(found["confirmed"], "tail_accuracy"))
    shown = capsys.readouterr().out
    assert "adjusted tail_accuracy with 2 fresh seeds, other validation images" in shown
    assert "cross-entropy" in shown
    [first, *_] = confirmed_lines(found["confirmed"], "tail_accuracy")
    assert first.startswith(f"Trial {found['best']} had ")
