"""The full rung: what a trial leaves in the storage, and why it ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy
import torch
from conftest import MakeSession
from fleet import lease, run_next
from optuna.trial import FrozenTrial, TrialState

from tuner import artifacts, proposals
from tuner.datasets import Data, Part
from tuner.errors import DataError
from tuner.evaluation import assess_validation
from tuner.losses import LOSSES
from tuner.pruning import Curve, Curves
from tuner.recipe import Recipe
from tuner.rungs import training
from tuner.rungs.outcome import Outcome
from tuner.session import Session


def stored(session: Session, number: int) -> FrozenTrial:
    return session.study.trials[number]


def test_complete_trial_holds_recipe_metrics_adjustment_and_a_value_per_epoch(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session()
    outcome = run_next(session, digits)
    trial = stored(session, 0)
    assert outcome.state == "complete"
    assert trial.state == TrialState.COMPLETE
    assert trial.value == trial.user_attrs["metrics"]["adjusted"]["tail_accuracy"]
    assert sorted(trial.intermediate_values) == [0, 1, 2]
    assert trial.intermediate_values[2] == trial.value
    assert trial.user_attrs["recipe"]["loss"] == {"name": "cross_entropy"}
    assert trial.user_attrs["kappa"] == 0
    assert {"tau", "extras", "seconds", "digest", "settled"} <= set(trial.user_attrs)
    assert "every image is drawn once" in trial.user_attrs["sampling"]
    low, high = trial.user_attrs["intervals"]["adjusted"]["tail_accuracy"]
    assert low <= trial.value <= high
    assert len(trial.user_attrs["recall_per_class"]) == 10


def test_metrics_can_be_recomputed_from_the_stored_logits(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session()
    run_next(session, digits)
    kept = artifacts.load_validation(session.trial_store(0))
    assert kept is not None
    recipe = Recipe.from_dict(stored(session, 0).user_attrs["recipe"])
    again = assess_validation(kept["logits"], digits, recipe)
    metrics = stored(session, 0).user_attrs["metrics"]
    for kind, found in (("raw", again.raw), ("adjusted", again.adjusted)):
        for name, value in found.items():
            assert value == pytest.approx(metrics[kind][name], abs=5e-3), (kind, name)


def test_raw_objective_is_used_when_the_study_asks_for_it(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(objective={"metric": "balanced_accuracy", "adjusted": False})
    run_next(session, digits)
    trial = stored(session, 0)
    assert trial.value == trial.user_attrs["metrics"]["raw"]["balanced_accuracy"]


def test_equivalent_recipe_is_answered_from_the_record(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = {"cross_entropy": {}, "asymmetric": {"eps": 0.0, "gamma_neg": 4.0}}
    session = make_session(space={"loss": losses}, budget={"trials": 2, "epochs": 3})
    run_next(session, digits)
    monkeypatch.setattr(training, "epochs_in_turns", lambda *_, **__: pytest.fail("trained again"))
    outcome = run_next(session, digits)
    assert outcome.state == "duplicate"
    trial = stored(session, 1)
    assert trial.user_attrs["duplicate_of"] == 0
    assert trial.value == stored(session, 0).value


def test_diverged_trial_is_pruned_at_once_with_the_reason(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(
        space={"optimizer": {"sgd": {"lr": [1e30, 1e29]}}}, budget={"trials": 2, "epochs": 3}
    )
    outcome = run_next(session, digits)
    assert (outcome.state, outcome.reason) == ("pruned", "not_finite")
    trial = stored(session, 0)
    assert trial.state == TrialState.PRUNED
    assert trial.user_attrs["reason"] == "not_finite"
    assert "epoch 0" in trial.user_attrs["detail"]


@pytest.mark.long
def test_trial_that_only_guesses_is_pruned_and_the_baseline_is_not(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(
        budget={"trials": 2, "epochs": 10},
        space={
            "optimizer": {"sgd": {"lr": [1e-12, 2e-12]}},
            "loss": {"cross_entropy": {}, "focal": {}},
        },
        model={"name": "small_cnn"},
        objective={"metric": "tail_accuracy", "adjusted": False, "floor": False},
        data={
            "name": "digits",
            "profile": {"name": "exponential", "ratio": 10},
            "validation_fraction": 0.4,
            "test_fraction": 0.3,
        },
    )
    with torch.no_grad():
        outcomes = [_guessing(session, digits), _guessing(session, digits)]
    assert [o.state for o in outcomes] == ["complete", "pruned"]
    assert outcomes[1].reason == "chance"
    assert len(stored(session, 1).intermediate_values) == 3


def test_chance_is_that_of_the_classes_that_have_validation_images(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(
        budget={"trials": 2, "epochs": 10},
        space={"loss": {"cross_entropy": {}, "focal": {}}},
        objective={"metric": "balanced_accuracy", "adjusted": False, "floor": False},
    )
    own = digits.validation
    few = torch.nonzero(own.targets < 4).flatten()
    data = replace(digits, validation=Part(own.images.select(few), own.targets[few]))
    outcomes = [_guessing(session, data), _guessing(session, data)]
    assert stored(session, 0).user_attrs["metrics"]["raw"]["balanced_accuracy"] == 0.25
    assert outcomes[1].reason == "chance"


def _guessing(session: Session, data: Data) -> Outcome:
    """Run a ticket whose model predicts class 0 for everything."""
    from tuner.lane import Lane

    constant = torch.zeros(len(data.validation), data.num_classes)
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(Lane, "logits", lambda *_: constant)
        return run_next(session, data)


def test_trial_far_behind_is_pruned_unless_it_belongs_to_the_control_group(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "is_behind", lambda *_, **__: True)
    pruned = make_session(search={"control": 0.0, "prune_after": 0.5})
    run_next(pruned, digits)
    outcome = run_next(pruned, digits)
    assert (outcome.state, outcome.reason) == ("pruned", "behind")
    assert stored(pruned, 0).state == TrialState.COMPLETE, "the baseline is never pruned"
    assert "metrics" in stored(pruned, 1).user_attrs

    spared = make_session(name="spared", search={"control": 1.0, "prune_after": 0.5})
    run_next(spared, digits)
    assert run_next(spared, digits).state == "complete"
    assert stored(spared, 1).user_attrs["would_prune_at"] == 1


def test_error_in_the_code_fails_the_trial_and_keeps_the_traceback(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("somebody's bug")

    monkeypatch.setattr(training, "epochs_in_turns", broken)
    session = make_session()
    assert run_next(session, digits).reason == "code_error"
    trial = stored(session, 0)
    assert trial.state == TrialState.FAIL
    assert "somebody's bug" in trial.user_attrs["detail"]


def test_trials_that_break_the_floor_are_no_peers_to_prune_by(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count(_: Curve, peers: Curves, **__: float) -> bool:
        seen.append(len(peers))
        return False

    monkeypatch.setattr(training, "is_behind", count)
    session = make_session(search={"control": 0.0}, budget={"trials": 4, "epochs": 4})
    for _ in range(2):
        run_next(session, digits)
    monkeypatch.setattr(Session, "keeps_floor", lambda *_: False)
    run_next(session, digits)
    assert seen == [0, 0, 1, 1, 0, 0]


def test_trial_that_went_to_another_worker_is_left_alone(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WRITE_SECONDS", 0.0)
    session = make_session()
    taken: list[Any] = []

    def steal(*_: object) -> None:
        if not taken:
            held = session.ledger.attempts()[0]
            assert session.ledger.reap([(held["worker_id"], held["generation"])]) == [0]
            taken.append(lease(session))

    outcome = run_next(session, digits, on_epoch=steal)
    assert outcome.state == "lost"
    trial = stored(session, 0)
    assert trial.state == TrialState.RUNNING
    assert sorted(trial.intermediate_values) == [0], "written before it was taken"
    attempts = session.ledger.attempts(trial._trial_id)
    assert [a["end"] for a in attempts] == ["lost", None]
    assert attempts[1]["token"] == taken[0].token


def test_short_epochs_are_written_together_and_all_are_there_at_the_end(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WRITE_SECONDS", 60.0)
    session = make_session(budget={"trials": 2, "epochs": 4})
    before = []

    def look(*_: object) -> None:
        before.append(len(session.ledger.epochs(stored(session, 0)._trial_id)))

    run_next(session, digits, on_epoch=look)
    assert before == [0, 0, 0, 0]
    trial = stored(session, 0)
    assert sorted(trial.intermediate_values) == [0, 1, 2, 3]
    assert [row["epoch"] for row in session.ledger.epochs(trial._trial_id)] == [0, 1, 2, 3]


def test_what_the_user_can_cure_leaves_the_trial_waiting_for_the_cure(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise DataError("photos/cat/7.jpg cannot be decoded")

    monkeypatch.setattr(training, "epochs_in_turns", broken)
    session = make_session()
    with pytest.raises(DataError, match=r"7\.jpg"):
        run_next(session, digits)
    assert stored(session, 0).state == TrialState.WAITING


def test_floor_is_set_as_a_constraint_of_the_trial(make_session: MakeSession, digits: Data) -> None:
    session = make_session(
        objective={"metric": "tail_accuracy", "floor": {"metric": "accuracy", "drop": 0.05}}
    )
    for _ in range(2):
        run_next(session, digits)
    baseline, other = session.study.trials[:2]
    expected = (
        baseline.user_attrs["metrics"]["raw"]["accuracy"]
        - other.user_attrs["metrics"]["adjusted"]["accuracy"]
        - 0.05
    )
    own = baseline.user_attrs["metrics"]
    drop = own["raw"]["accuracy"] - own["adjusted"]["accuracy"] - 0.05
    assert session.keeps_floor(baseline) == (drop <= 0)
    assert baseline.constraints == {"floor": pytest.approx(drop)}, "adjusted, against itself"
    assert other.constraints == {"floor": pytest.approx(expected)}


def test_stopped_trial_goes_back_and_ends_as_if_it_had_never_stopped(
    make_session: MakeSession, digits: Data
) -> None:
    whole = make_session(budget={"trials": 4, "epochs": 5})
    for _ in range(3):
        run_next(whole, digits)
    session = make_session(name="stopped", budget={"trials": 4, "epochs": 5})
    for _ in range(2):
        run_next(session, digits)
    assert run_next(session, digits, stop=lambda: True).state == "interrupted"
    assert stored(session, 2).state == TrialState.WAITING
    assert artifacts.CHECKPOINT in session.trial_store(2).keys("")
    assert run_next(session, digits).state == "complete"
    ours, theirs = stored(session, 2), stored(whole, 2)
    assert ours.params == theirs.params
    assert ours.intermediate_values == theirs.intermediate_values
    assert ours.user_attrs["metrics"] == theirs.user_attrs["metrics"]
    assert artifacts.CHECKPOINT not in session.trial_store(2).keys("")


def test_weights_are_kept_of_the_best_trial_and_the_baseline_only(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(budget={"trials": 5, "epochs": 3})
    for _ in range(5):
        run_next(session, digits)
    best = session.best()
    assert best is not None
    kept = [key for key in session.store.keys("trial-") if key.endswith(artifacts.WEIGHTS)]
    numbers = sorted({0, best.number})
    assert kept == [f"trial-{number:05d}/{artifacts.WEIGHTS}" for number in numbers]


def test_baseline_is_plain_even_where_the_space_has_no_plain_choice(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(
        space={
            "loss": {"focal": {}, "ldam": {}},
            "sampler": {"class_aware": {"exponent": [0.5, 1.0]}},
        }
    )
    run_next(session, digits)
    recipe = stored(session, 0).user_attrs["recipe"]
    assert recipe["loss"]["name"] == "cross_entropy"
    assert recipe["sampler"]["name"] == "natural"


@pytest.mark.parametrize("loss", list(LOSSES))
def test_every_loss_trains_through_the_whole_path(
    loss: str, make_session: MakeSession, digits: Data
) -> None:
    session = make_session(
        budget={"trials": 2, "epochs": 3},
        space={"loss": {"cross_entropy": {}, **({loss: {}} if loss != "cross_entropy" else {})},
               "optimizer": {"sgd": {"lr": [0.05, 0.1]}}},
    )  # fmt: skip
    outcomes = [run_next(session, digits) for _ in range(2)]
    assert all(o.state in ("complete", "duplicate") for o in outcomes), outcomes


def test_checkpoint_that_cannot_be_read_begins_at_epoch_0_and_the_record_says_so(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session()
    assert run_next(session, digits, stop=lambda: True).state == "interrupted"
    session.trial_store(0).write(artifacts.CHECKPOINT, b"not a checkpoint")
    assert run_next(session, digits).state == "complete"
    first, second = session.ledger.attempts()
    assert (first["end"], first["reason"]) == ("preempted", "signal")
    assert second["first_epoch"] == 0
    assert second["note"].startswith("from epoch 0: ")
    assert "not a readable checkpoint" in second["note"]


def test_metric_vector_of_every_epoch_is_kept_once_however_often_it_was_trained(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session()
    run_next(session, digits, stop=lambda: True)
    run_next(session, digits)
    trial = stored(session, 0)
    rows = session.ledger.epochs(trial._trial_id)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    tails = [row["metrics"]["adjusted"]["tail_accuracy"] for row in rows]
    assert tails == [trial.intermediate_values[epoch] for epoch in range(3)]
    assert rows[-1]["metrics"] == trial.user_attrs["metrics"]
    assert all(row["samples"] > 0 and row["seconds"] > 0 for row in rows[1:])


def test_storage_that_is_away_for_a_while_costs_no_epoch(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_session(name="whole", budget={"trials": 4, "epochs": 5})
    run_next(whole, digits)
    session = make_session(budget={"trials": 4, "epochs": 5})
    flush, calls = session.fenced.flush, []

    def away(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if 2 <= len(calls) <= 4:
            raise sqlalchemy.exc.OperationalError("UPDATE", {}, Exception("server went away"))
        return flush(*arguments, **options)

    monkeypatch.setattr(session.fenced, "flush", away)
    assert run_next(session, digits).state == "complete"
    assert stored(session, 0).intermediate_values == stored(whole, 0).intermediate_values
    assert len(session.ledger.epochs(stored(session, 0)._trial_id)) == 5


def test_algorithm_that_raises_ends_its_trial_and_not_the_worker(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_session()

    def broken(*_: object) -> None:
        raise ZeroDivisionError("nothing to propose")

    with monkeypatch.context() as patched:
        patched.setattr(proposals, "algorithm", broken)
        assert run_next(session, digits).reason == "code_error"
    assert stored(session, 0).state == TrialState.FAIL
    assert "nothing to propose" in stored(session, 0).user_attrs["detail"]
    assert run_next(session, digits).state == "complete"


def test_device_that_broke_down_ends_the_process_and_leaves_the_trial_to_others(
    make_session: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    session = make_session()
    monkeypatch.setattr(training, "epochs_in_turns", broken)
    with pytest.raises(SystemExit) as left:
        run_next(session, digits)
    assert left.value.code == 70
    held = session.ledger.attempts()[0]
    assert held["end"] is None
    assert session.ledger.reap([(held["worker_id"], held["generation"])]) == [0]
