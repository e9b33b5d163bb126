"""A study in a storage: one queue, exact budget, nothing claimed twice, nothing mixed up."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy as sa
import torch
from conftest import MakeFile, MakeSession
from fleet import claim, give_back
from image_folders import photos
from optuna.trial import TrialState

from tuner import session as sessions
from tuner import tickets
from tuner.datasets import Data
from tuner.doubts import cautions
from tuner.errors import DataError, StorageError, TunerError
from tuner.fit import check_data
from tuner.imbalance import class_entropy
from tuner.ledger._tables import metadata
from tuner.session import Session
from tuner.storage import exclusive, open_storage
from tuner.stores import FolderStore
from tuner.tickets import fill_queue


def test_queue_starts_with_the_baseline_and_one_default_per_loss(
    make_session: MakeSession,
) -> None:
    losses: dict[str, Any] = {"cross_entropy": {}, "focal": {}, "ldam": {}}
    session = make_session(budget={"trials": 6, "epochs": 3}, space={"loss": losses})
    attrs = [trial.user_attrs for trial in session.trials(TrialState.WAITING)]
    assert [a.get("baseline") for a in attrs] == [True, None, None, None, None, None]
    assert [a.get("preset") for a in attrs] == [None, "focal", "ldam", None, None, None]


def test_creating_again_adds_nothing_and_a_larger_budget_adds_the_difference(
    make_session: MakeSession,
) -> None:
    make_session(budget={"trials": 4, "epochs": 3})
    assert len(make_session(budget={"trials": 4, "epochs": 3}).trials()) == 4
    assert len(make_session(budget={"trials": 7, "epochs": 3}).trials()) == 7


def test_long_queue_is_filled_in_portions_up_to_the_budget(make_session: MakeSession) -> None:
    session = make_session(budget={"trials": tickets.AHEAD + 9, "epochs": 3})
    assert len(session.trials()) == tickets.AHEAD
    assert fill_queue(session) == 0
    for _ in range(5):
        claim(session)
    assert fill_queue(session) == 0, "most of the portion still waits"
    while claim(session):
        pass
    assert len(session.trials()) == tickets.AHEAD + 9


def test_changed_study_file_under_an_old_name_is_refused(make_session: MakeSession) -> None:
    make_session()
    with pytest.raises(StorageError, match="'tiny'.*new name"):
        make_session(budget={"trials": 4, "epochs": 5})


def test_other_data_are_refused(
    make_file: MakeFile, sqlite: str, tmp_path: Path, digits: Data
) -> None:
    sessions.create(make_file(), sqlite, FolderStore(tmp_path), digits)
    other = replace(digits, fingerprint="0" * 64)
    with pytest.raises(DataError, match="fingerprint"):
        sessions.create(make_file(), sqlite, FolderStore(tmp_path), other)
    joined = sessions.join("tiny", sqlite, FolderStore(tmp_path))
    with pytest.raises(DataError, match="fingerprint"):
        check_data(joined.study.user_attrs, other, "tiny")


def test_tail_without_validation_images_is_refused(
    make_file: MakeFile, sqlite: str, tmp_path: Path, digits: Data
) -> None:
    from tuner.datasets import Part

    keep = ~sum(digits.validation.targets == c for c in digits.groups.tail).bool()  # type: ignore[union-attr]
    part = Part(
        digits.validation.images.select(keep.nonzero()[:, 0]), digits.validation.targets[keep]
    )
    for carved, cure in (
        (True, "give it more images, raise data.validation_fraction"),
        (False, "put some into the"),
    ):
        data = replace(digits, validation=part, carved=carved)
        first = digits.groups.tail[0]
        named = rf"tail_accuracy cannot .* classes, {digits.class_names[first]} \(\d+ in training"
        with pytest.raises(DataError, match=f"{named}.*{cure}"):
            sessions.create(make_file(), sqlite, FolderStore(tmp_path), data)


def test_model_that_cannot_be_built_is_refused_before_any_training(
    make_session: MakeSession,
) -> None:
    space = {"model": {"torchvision": {"architecture": ["resnet18", "resnet81"]}}}
    with pytest.raises(TunerError, match="resnet81.*did you mean"):
        make_session(space=space, model=None)


def test_broken_test_image_is_found_before_any_training(
    make_file: MakeFile, sqlite: str, tmp_path: Path
) -> None:
    photos(tmp_path / "photos/train", {"many": 30, "some": 20, "rare": 8})
    photos(tmp_path / "photos/test", {"many": 3, "some": 3, "rare": 3}, first=1000)
    (tmp_path / "photos/test/rare/001.png").write_text("no image")
    file = make_file(data={"name": "image_folder", "root": "photos", "image_size": 8})
    data = file.data.build(tmp_path)
    with pytest.raises(DataError, match=r"test/rare/001\.png"):
        sessions.create(file, sqlite, FolderStore(tmp_path / "artifacts"), data)


def test_studies_of_one_name_in_two_storages_keep_their_artifacts_apart(
    make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    root, urls = FolderStore(tmp_path), [f"sqlite:///{tmp_path}/{name}.db" for name in "ab"]
    stores = {sessions.create(make_file(), url, root, digits).store for url in urls}
    assert len(stores) == 2
    assert sessions.join("tiny", urls[0], root).store in stores


def test_small_validation_part_says_what_it_cannot_tell(make_session: MakeSession) -> None:
    warnings = " ".join(make_session().study.user_attrs["warnings"])
    assert "fewer than 10 validation images" in warnings
    assert "standard error" in warnings


def test_unknown_study_names_the_ones_there_are(
    make_session: MakeSession, sqlite: str, tmp_path: Path
) -> None:
    make_session()
    with pytest.raises(StorageError, match="no study 'tinny'.*did you mean 'tiny'"):
        sessions.join("tinny", sqlite, FolderStore(tmp_path))


def test_study_of_somebody_else_is_not_touched(sqlite: str, tmp_path: Path) -> None:
    optuna.create_study(study_name="theirs", storage=open_storage(sqlite))
    with pytest.raises(StorageError, match="not made by Tuner"):
        sessions.join("theirs", sqlite, FolderStore(tmp_path))


def test_claims_come_in_order_and_a_requeued_trial_first(make_session: MakeSession) -> None:
    session = make_session()
    first, second = claim(session), claim(session)
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (0, 1)
    give_back(session, first)
    again = claim(session)
    assert again is not None
    assert again.number == 0


def test_requeued_trial_keeps_its_parameters(make_session: MakeSession) -> None:
    session = make_session(budget={"trials": 6, "epochs": 3})
    for _ in range(2):
        claim(session)
    free = claim(session)
    assert free is not None
    recipe = session.file.space.suggest(free)
    give_back(session, free)
    again = claim(session)
    assert again is not None
    assert again.number == free.number
    assert session.file.space.suggest(again) == recipe


def test_proposals_depend_on_the_study_seed_and_trial_only(
    make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    def proposals(folder: str, seed: int) -> list[dict[str, Any]]:
        file = make_file(search={"algorithm": "tpe", "seed": seed})
        url = f"sqlite:///{tmp_path}/{folder}.db"
        session = sessions.create(file, url, FolderStore(tmp_path / folder), digits)
        found = []
        while trial := claim(session):
            session.file.space.suggest(trial)
            found.append(trial.params)
        return found

    assert proposals("a", 0) == proposals("b", 0)
    assert proposals("a2", 0) != proposals("c", 1)


def test_grid_queues_every_distinct_point_once(make_session: MakeSession) -> None:
    loss = {"class_balanced": {"beta": [0.9, 0.99], "base": ["softmax", "focal"], "gamma": [1, 2]}}
    session = make_session(budget={"epochs": 3}, search={"algorithm": "grid"}, space={"loss": loss})
    assert len(session.trials()) == 1 + 2 * (1 + 2)


def finish(session: Session, *, tail: float, overall: float = 0.9, **attrs: Any) -> None:
    """Complete the next ticket with the given accuracies, without training."""
    trial = claim(session)
    assert trial is not None
    metrics = {"tail_accuracy": tail, "accuracy": overall, "balanced_accuracy": overall}
    trial.set_user_attr("metrics", {"raw": metrics, "adjusted": metrics})
    for key, value in attrs.items():
        trial.set_user_attr(key, value)
    session.study.tell(trial, tail)


def test_best_keeps_the_floor_below_the_baseline(make_session: MakeSession) -> None:
    session = make_session()
    finish(session, tail=0.3, overall=0.9)
    finish(session, tail=0.9, overall=0.2)
    finish(session, tail=0.6, overall=0.89)
    best = session.best()
    assert best is not None
    assert best.number == 2


def test_floor_binds_where_plain_cross_entropy_has_less_than_the_drop(
    make_session: MakeSession,
) -> None:
    session = make_session()
    finish(session, tail=0.0, overall=0.018)
    finish(session, tail=0.5, overall=0.002)
    finish(session, tail=0.1, overall=0.015)
    best = session.best()
    assert best is not None
    assert best.number == 2
    assert not session.keeps_floor(session.trials()[1])


def test_study_whose_baseline_guesses_says_so(make_session: MakeSession) -> None:
    session = make_session()
    assert list(cautions(session)) == []
    finish(session, tail=0.0, overall=0.1)
    (said,) = cautions(session)
    assert said.startswith("plain cross-entropy does no better than guessing")
    better = make_session(name="better")
    finish(better, tail=0.3, overall=0.2)
    assert list(cautions(better)) == []


@pytest.mark.parametrize(
    ("share", "attrs", "is_little"),
    [
        (0.9, {}, True),
        (0.7, {}, True),
        (0.6, {}, False),
        (0.9, {"recipe": {"augment": {"name": "standard", "mixup": 0.4}}}, False),
        (0.9, {"recipe": {"augment": {"name": "standard", "mixup": 0.0}}}, True),
        (0.9, {"fidelity": "head"}, False),
    ],
)
def test_study_whose_trainings_learn_little_says_so(
    share: float, attrs: dict[str, Any], is_little: bool, make_session: MakeSession
) -> None:
    session = make_session()
    alone = class_entropy(torch.tensor(session.study.user_attrs["class_counts"]))
    finish(session, tail=0.3, overall=0.4, train_loss=share * alone, **attrs)
    said = list(cautions(session))
    assert [text.startswith("plain cross-entropy has learnt little") for text in said] == (
        [True] if is_little else []
    )


def test_when_all_break_the_floor_the_least_breach_is_best(make_session: MakeSession) -> None:
    session = make_session()
    trial = claim(session)
    assert trial is not None
    raw = {"tail_accuracy": 0.3, "accuracy": 0.9, "balanced_accuracy": 0.6}
    adjusted = raw | {"tail_accuracy": 0.5, "accuracy": 0.85}
    trial.set_user_attr("metrics", {"raw": raw, "adjusted": adjusted})
    session.study.tell(trial, 0.5)
    assert not session.keeps_floor(session.study.trials[0]), "adjusted, it breaks its own floor"
    (said,) = cautions(session)
    assert said.startswith("no complete trial keeps the floor: accuracy at most 2 points")
    finish(session, tail=0.9, overall=0.2)
    best = session.best()
    assert best is not None
    assert best.number == 0
    finish(session, tail=0.4, overall=0.89)
    best = session.best()
    assert best is not None
    assert best.number == 2


def end(session: Session, state: TrialState) -> int:
    trial = claim(session)
    assert trial is not None
    session.study.tell(trial, state=state)
    return trial.number


def test_baseline_without_a_result_is_tried_again_more_slowly(make_session: MakeSession) -> None:
    session = make_session()
    assert end(session, TrialState.PRUNED) == 0
    assert fill_queue(session) == 1
    again = claim(session)
    assert again is not None
    assert again.number == 4, "before the other tickets"
    assert again.user_attrs["baseline"]
    rate = session.study.trials[0].system_attrs["fixed_params"]["optimizer.sgd.lr"]
    session.file.space.suggest(again)
    assert again.params["optimizer.sgd.lr"] == pytest.approx(max(0.3 * rate, 0.05))
    session.study.tell(again, state=TrialState.FAIL)
    assert fill_queue(session) == 1
    end(session, TrialState.FAIL)
    assert fill_queue(session) == 0, "three attempts are enough"


def test_trial_of_a_plain_optuna_script_is_no_candidate(make_session: MakeSession) -> None:
    session = make_session()
    theirs = optuna.load_study(study_name="tiny", storage=session.fenced.behind)
    theirs.add_trial(optuna.trial.create_trial(value=1.0))
    assert session.best() is None


def test_without_a_floor_the_highest_tail_wins(make_session: MakeSession) -> None:
    session = make_session(objective={"metric": "tail_accuracy", "floor": False})
    finish(session, tail=0.3, overall=0.9)
    finish(session, tail=0.9, overall=0.2)
    best = session.best()
    assert best is not None
    assert best.number == 1


def test_equal_values_are_told_apart_by_balanced_accuracy(make_session: MakeSession) -> None:
    session = make_session()
    for overall in (0.90, 0.91, 0.93, 0.92):
        finish(session, tail=0.5, overall=overall)
    best = session.best()
    assert best is not None
    assert best.number == 2


PROGRESSIVE: dict[str, Any] = {
    "budget": {"trials": 9, "epochs": 3},
    "search": {"strategy": "progressive", "gate": 0.6},
    "space": {
        "loss": {
            "cross_entropy": {},
            "weighted_cross_entropy": {"power": [0.5, 1.0]},
            "asymmetric": {},
            "weighted_asymmetric": {},
        },
        "sampler": {"natural": {}, "class_aware": {"tail_factor": [1.0, 2.0]}},
    },
}


def queued(session: Session) -> list[str]:
    waiting = session.trials(TrialState.WAITING)
    return [t.system_attrs["fixed_params"]["loss"] for t in waiting]


def test_progressive_ladder_climbs_while_the_tail_is_below_the_gate(
    make_session: MakeSession,
) -> None:
    session = make_session(**PROGRESSIVE)
    assert queued(session) == ["cross_entropy"] * 3
    for _ in range(3):
        finish(session, tail=0.3)
    assert fill_queue(session) == 2
    assert queued(session) == ["weighted_cross_entropy"] * 2
    finish(session, tail=0.3)
    assert fill_queue(session) == 0, "a rung ends before the next begins"
    finish(session, tail=0.5)
    fill_queue(session)
    assert queued(session) == ["asymmetric"] * 2
    for _ in range(2):
        finish(session, tail=0.4)
    fill_queue(session)
    waiting = session.trials(TrialState.WAITING)
    fixed = [t.system_attrs["fixed_params"] for t in waiting]
    assert [f["loss"] for f in fixed] == ["weighted_asymmetric"] * 2
    assert [f["sampler"] for f in fixed] == ["class_aware"] * 2
    for _ in range(2):
        finish(session, tail=0.45)
    assert fill_queue(session) == 0
    best = session.best()
    assert best is not None
    assert best.number == 4, "the best rung is returned, not the last"


def test_progressive_ladder_says_where_it_stands(make_session: MakeSession) -> None:
    assert tickets.ladder_state(make_session()) == []
    session = make_session(**PROGRESSIVE | {"name": "ladder"})
    for _ in range(3):
        finish(session, tail=0.7)
    said = tickets.ladder_state(session)
    assert said == ["progressive strategy: rung 1 of 4 (cross_entropy), gate 0.60 reached"]


def test_progressive_ladder_goes_on_with_a_larger_budget(make_session: MakeSession) -> None:
    session = make_session(**PROGRESSIVE)
    for _ in range(3):
        finish(session, tail=0.3)
    larger = make_session(**PROGRESSIVE | {"budget": {"trials": 13, "epochs": 3}})
    assert queued(larger) == ["cross_entropy"]
    finish(larger, tail=0.3)
    assert fill_queue(larger) == 3
    assert queued(larger) == ["weighted_cross_entropy"] * 3


def test_progressive_ladder_stops_once_the_gate_is_passed(make_session: MakeSession) -> None:
    session = make_session(**PROGRESSIVE)
    for _ in range(3):
        finish(session, tail=0.61)
    assert fill_queue(session) == 0


def _claim_all(url: str, folder: Path, start: Any, results: Any) -> None:
    start.wait()
    session = sessions.join("tiny", url, FolderStore(folder))
    numbers = []
    while trial := claim(session):
        numbers.append(trial.number)
    results.put(numbers)


def _create_at_once(make: Any, url: str, folder: Path, start: Any, results: Any) -> None:
    file, data = make
    start.wait()
    sessions.create(file, url, FolderStore(folder), data)
    results.put([])


def _in_processes(target: Any, count: int, *args: Any) -> list[list[int]]:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(count), context.Queue()
    processes = [context.Process(target=target, args=(*args, start, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    return found


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.database)])
def storage(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_every_ticket_is_claimed_by_exactly_one_of_many_processes(
    storage: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    file = make_file(budget={"trials": 40, "epochs": 3})
    sessions.create(file, storage, FolderStore(tmp_path), digits)
    claimed = _in_processes(_claim_all, 4, storage, tmp_path)
    assert sorted(number for numbers in claimed for number in numbers) == list(range(40))


@pytest.mark.long
def test_many_processes_create_one_study_with_one_queue_on_an_empty_storage(
    storage: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    made = (make_file(budget={"trials": 10, "epochs": 3}), digits)
    _in_processes(_create_at_once, 4, made, storage, tmp_path)
    assert len(sessions.join("tiny", storage, FolderStore(tmp_path)).trials()) == 10


def test_study_is_joined_while_somebody_holds_the_lock(
    database: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path / "artifacts")
    sessions.create(make_file(), database, store, digits)
    with ThreadPoolExecutor() as pool, exclusive(database):
        for writes in (False, True):
            joined = pool.submit(sessions.join, "tiny", database, store, writes=writes)
            assert joined.result(timeout=60).file.name == "tiny"


def test_who_must_make_the_tables_waits_for_the_lock(
    database: str, make_file: MakeFile, digits: Data, tmp_path: Path
) -> None:
    store = FolderStore(tmp_path / "artifacts")
    engine = sessions.create(make_file(), database, store, digits).ledger.engine
    with engine.begin() as connection:
        metadata.drop_all(connection)
        connection.execute(sa.text("DROP TABLE tuner_version"))
    with ThreadPoolExecutor() as pool:
        with exclusive(database):
            joined = pool.submit(sessions.join, "tiny", database, store)
            time.sleep(0.5)
            assert not joined.done()
        assert joined.result(timeout=60).ledger.ready()


def test_trials_that_wait_since_the_budget_was_larger_are_told(
    make_session: MakeSession, caplog: pytest.LogCaptureFixture
) -> None:
    make_session(budget={"trials": 9, "epochs": 3})
    assert not caplog.records
    make_session(budget={"trials": 4, "epochs": 3})
    assert "budget.trials = 4, but 5 more wait" in caplog.text
    caplog.clear()
    make_session(budget={"trials": 12, "epochs": 3})
    assert not caplog.records
