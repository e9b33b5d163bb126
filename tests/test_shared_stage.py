"""Stage one of deferred trials: trained once, branched from by the others of the study."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import MakeSession
from fleet import lease, run_alone, run_next, slot
from optuna.trial import FrozenTrial, TrialState

from tuner import artifacts, checkpoint
from tuner.datasets import Data
from tuner.pruning import Curve
from tuner.rungs import shared, training
from tuner.rungs.peers import Peers
from tuner.session import Session
from tuner.stores import FolderStore, StoreError
from tuner.trainer import EpochResult
from tuner.trainer import epochs_in_turns as real_epochs
from tuner.worker import work

SWITCH, EPOCHS = 4, 6
LOSSES: dict[str, Any] = {"focal": {}, "balanced_softmax": {}, "label_smoothing": {}}


@pytest.fixture
def make_deferred(make_session: MakeSession) -> MakeSession:
    """Creates studies whose trials differ in their loss only, which acts late."""

    def make(**sections: Any) -> Session:
        values: dict[str, Any] = {
            "budget": {"trials": 4, "epochs": EPOCHS},
            "training": {"name": "deferred", "switch": 0.6, "batch_size": 64},
            "optimizer": {"name": "sgd", "lr": 0.2},
            "model": {"name": "mlp"},
            "space": {"loss": LOSSES},
            "search": {"control": 0.0, "pruner": "none"},
        }
        return make_session(**{**values, **sections})

    return make


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every epoch that is trained, in order."""
    seen: list[int] = []

    def counting(*arguments: Any, **options: Any) -> Iterator[EpochResult | None]:
        for result in real_epochs(*arguments, **options):
            if result is not None:
                seen.append(result.epoch)
            yield result

    monkeypatch.setattr(training, "epochs_in_turns", counting)
    return seen


def stored(session: Session, number: int) -> FrozenTrial:
    return session.study.trials[number]


def stage_files(session: Session) -> list[str]:
    return session.store.keys("stage-")


def after_the_baseline(session: Session, data: Data, trained: list[int]) -> None:
    assert run_next(session, data).state == "complete"
    assert stage_files(session) == []
    trained.clear()


def test_second_trial_branches_from_what_the_first_one_trained(
    make_deferred: MakeSession, digits: Data, trained: list[int]
) -> None:
    session = make_deferred()
    after_the_baseline(session, digits, trained)
    assert run_next(session, digits).state == "complete"
    assert trained == list(range(EPOCHS))
    first = stored(session, 1)
    assert first.user_attrs.get("branched_from") is None
    assert 0 < first.user_attrs["stage_one_seconds"] < first.user_attrs["seconds"]
    (file,) = stage_files(session)
    trained.clear()

    assert run_next(session, digits).state == "complete"
    assert trained == [SWITCH, SWITCH + 1], "a third of the training"
    second = stored(session, 2)
    assert sorted(second.intermediate_values) == trained
    assert file == f"stage-{second.user_attrs['branched_from']}/{artifacts.CHECKPOINT}"
    assert "stage_one_seconds" not in second.user_attrs
    rows = session.ledger.epochs(second._trial_id)
    assert [row["epoch"] for row in rows] == trained
    seconds = sum(row["seconds"] for row in rows)
    assert second.user_attrs["seconds"] == pytest.approx(seconds), "its own epochs and no others"
    assert session.ledger.attempts(second._trial_id)[0]["first_epoch"] == SWITCH


def test_branched_trial_has_the_result_of_one_that_trained_everything(
    make_deferred: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    branching, whole = make_deferred(), make_deferred(name="whole")
    for _ in range(4):
        run_next(branching, digits)
    monkeypatch.setattr(shared, "branch", lambda *_: (None, None))
    for _ in range(4):
        run_next(whole, digits)
    for number in (2, 3):
        ours, theirs = stored(branching, number), stored(whole, number)
        assert ours.user_attrs["loss"] == theirs.user_attrs["loss"]
        assert ours.user_attrs["branched_from"] is not None
        assert ours.user_attrs["metrics"] == theirs.user_attrs["metrics"]
        assert ours.value == theirs.value


def test_trials_that_train_the_same_stage_at_once_leave_the_same(
    make_deferred: MakeSession, digits: Data, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_deferred()
    after_the_baseline(session, digits, trained)
    run_next(session, digits)
    (file,) = stage_files(session)
    first, facts = checkpoint.from_bytes(session.store.read(file), file)
    with monkeypatch.context() as patched:
        patched.setattr(shared, "branch", lambda *_: (None, None))
        run_next(session, digits)
    assert stage_files(session) == [file]
    second, others = checkpoint.from_bytes(session.store.read(file), file)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {**facts, "recipe": ""} == {**others, "recipe": ""}


def test_trial_that_lost_its_worker_without_a_checkpoint_branches_from_its_own_stage_one(
    make_deferred: MakeSession, digits: Data, trained: list[int]
) -> None:
    session = make_deferred()
    after_the_baseline(session, digits, trained)
    whole = make_deferred(name="whole")
    for _ in range(2):
        run_next(whole, digits)
    trained.clear()
    die(session, digits, at=SWITCH)
    assert artifacts.CHECKPOINT not in session.trial_store(1).keys("")
    cost = stored(session, 1).user_attrs["stage_one_seconds"]
    trained.clear()

    assert run_next(session, digits).state == "complete"
    assert trained == [SWITCH, SWITCH + 1]
    trial = stored(session, 1)
    assert trial.intermediate_values == stored(whole, 1).intermediate_values
    assert trial.user_attrs.get("branched_from") is None, "it trained the stage itself"
    assert trial.user_attrs["seconds"] > cost, "and pays for it"
    note = session.ledger.attempts(trial._trial_id)[1]["note"]
    assert note == f"from epoch {SWITCH}: there was no checkpoint"


def test_trial_goes_on_from_its_own_checkpoint_before_any_shared_one(
    make_deferred: MakeSession, digits: Data, trained: list[int]
) -> None:
    session = make_deferred()
    after_the_baseline(session, digits, trained)
    run_next(session, digits)
    trained.clear()
    assert run_next(session, digits, stop=lambda: len(trained) > 0).state == "interrupted"
    assert trained == [SWITCH]
    assert run_next(session, digits).state == "complete"
    assert trained == [SWITCH, SWITCH + 1]
    trial = stored(session, 2)
    assert trial.user_attrs["branched_from"]
    assert [a["first_epoch"] for a in session.ledger.attempts(trial._trial_id)] == [4, 5]


def test_unreadable_shared_state_is_trained_anew_and_replaced(
    make_deferred: MakeSession, digits: Data, trained: list[int]
) -> None:
    session = make_deferred()
    after_the_baseline(session, digits, trained)
    run_next(session, digits)
    (file,) = stage_files(session)
    good = session.store.read(file)
    session.store.write(file, good[:1000])
    trained.clear()
    assert run_next(session, digits).state == "complete"
    assert trained == list(range(EPOCHS))
    trial = stored(session, 2)
    assert trial.user_attrs.get("branched_from") is None
    note = session.ledger.attempts(trial._trial_id)[0]["note"]
    assert note.startswith("trains stage one itself: ")
    assert "not a readable checkpoint" in note
    trained.clear()
    run_next(session, digits)
    assert trained == [SWITCH, SWITCH + 1]


def test_store_that_is_full_costs_the_sharing_and_not_the_trial(
    make_deferred: MakeSession, digits: Data, trained: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, write = make_deferred(), FolderStore.write
    after_the_baseline(session, digits, trained)

    def full(store: FolderStore, key: str, content: bytes) -> None:
        if "stage-" in str(store):
            raise StoreError("cannot write: no space left")
        write(store, key, content)

    monkeypatch.setattr(FolderStore, "write", full)
    assert run_next(session, digits).state == "complete"
    trial = stored(session, 1)
    assert "stage_one_seconds" not in trial.user_attrs
    note = session.ledger.attempts(trial._trial_id)[0]["note"]
    assert note == "stage one is not shared: cannot write: no space left"


def test_studies_share_nothing_with_each_other(
    make_deferred: MakeSession, digits: Data, trained: list[int]
) -> None:
    one, other = make_deferred(), make_deferred(name="other")
    after_the_baseline(one, digits, trained)
    run_next(one, digits)
    after_the_baseline(other, digits, trained)
    (file,) = stage_files(one)
    other.store.write(file, one.store.read(file))
    run_next(other, digits)
    assert trained == list(range(EPOCHS))
    trial = stored(other, 1)
    assert "is of another study" in other.ledger.attempts(trial._trial_id)[0]["note"]


def test_late_recipe_that_is_plain_is_answered_by_the_baseline(
    make_deferred: MakeSession, digits: Data
) -> None:
    plain = {"asymmetric": {"eps": 0.0, "gamma_neg": 4.0}}
    session = make_deferred(space={"loss": {**plain, "focal": {}}})
    run_next(session, digits)
    assert run_next(session, digits).state == "duplicate"


def test_branched_trial_is_compared_from_its_own_first_epoch_on(
    make_deferred: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []

    def behind(own: Curve, *_: Any, **__: Any) -> bool:
        seen.append((own.first, len(own.values)))
        return False

    session = make_deferred(search={"control": 0.0, "prune_after": 0.1})
    for _ in range(2):
        run_next(session, digits)
    monkeypatch.setattr(training, "is_behind", behind)
    run_next(session, digits)
    assert seen == [(SWITCH, 1)], "the last epoch ends the trial anyway"
    whole, branched = Peers(session).now("full").curves[-2:]
    assert (whole.first, whole.length) == (0, EPOCHS)
    assert (branched.first, branched.length) == (SWITCH, EPOCHS)
    assert branched.at(1.0) == stored(session, 2).value


def test_shared_stages_go_with_the_last_worker_of_a_study_that_is_done(
    make_deferred: MakeSession, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make_deferred()
    for _ in range(3):
        run_next(session, digits)
    elsewhere = lease(session)
    assert elsewhere is not None
    assert len(stage_files(session)) == 1
    assert work(session, digits, wait=False) == 0
    assert len(stage_files(session)) == 1, "the last trial is still being trained"
    assert run_alone(slot(session, digits, elsewhere), elsewhere).state == "complete"
    assert stored(session, 3).user_attrs["branched_from"]
    with monkeypatch.context() as patched:
        patched.setattr(FolderStore, "keys", refuse)
        assert work(session, digits) == 0, "a store that fails costs nothing else"
    assert work(session, digits) == 0
    assert stage_files(session) == []


def refuse(*_: object) -> list[str]:
    raise StoreError("cannot list: no such device")


def test_shared_stages_stay_while_a_study_may_go_on(
    make_deferred: MakeSession, digits: Data
) -> None:
    session = make_deferred()
    for _ in range(2):
        run_next(session, digits)
    session.ledger.give_order("stop", "asked for")
    assert work(session, digits) == 0
    assert len(stage_files(session)) == 1
    session.ledger.give_order("run")
    assert work(session, digits) == 2
    assert stage_files(session) == []
    larger = make_deferred(budget={"trials": 5, "epochs": EPOCHS})
    assert work(larger, digits) == 1
    assert stored(larger, 4).state == TrialState.COMPLETE, "it trained the stage again"


def die(session: Session, data: Data, *, at: int) -> None:
    """Run the next trial in a process that is gone with this epoch, as after ``kill -9``."""

    class Killed(BaseException):
        pass

    def kill(_: object, result: EpochResult, __: float) -> None:
        if result.epoch == at:
            held = session.ledger.attempts()[-1]
            session.ledger.reap([(held["worker_id"], held["generation"])])
            raise Killed

    with pytest.raises(Killed):
        run_next(session, data, on_epoch=kill)
    session.fenced.drop(stored(session, 1)._trial_id)
    assert stored(session, 1).state == TrialState.WAITING
