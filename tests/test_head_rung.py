"""The head rung at work: cohorts of real classifiers, interrupted, killed, and alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
import torch
from climbers import CLIMBING
from conftest import MakeSession
from fleet import lease, run_alone, run_next, slot
from optuna.trial import TrialState
from test_heads_features import files_of_at_most

from tuner import trained
from tuner.alone import alone
from tuner.datasets import Data
from tuner.errors import TunerError
from tuner.evaluation import assess_validation
from tuner.export import export
from tuner.heads import Features, HeadResult, _features, train_heads
from tuner.ladder import rung_of
from tuner.lane import Lane
from tuner.pulse import facts
from tuner.recipe import Recipe
from tuner.rungs import head
from tuner.rungs.outcome import Outcome, Slot
from tuner.rungs.recipes import resolve
from tuner.session import Session
from tuner.trained import stored_recipe, trained_lane
from tuner.verdict import decide
from tuner.worker import work

SMALL: dict[str, Any] = CLIMBING | {
    "name": "heads",
    "budget": {"trials": 6, "epochs": 3},
    "ladder": {"rungs": ["head", "full"], "head": {"trials": 24, "epochs": 2, "steps": 0}},
    "model": {"name": "mlp", "width": 16},
}
ALONE = SMALL | {
    "ladder": {"rungs": ["head"], "head": {"epochs": 2, "steps": 0}},
    "budget": {"trials": 12, "epochs": 3},
}
NUMBERS = range(1, 25)


@pytest.fixture
def ready(make_session: MakeSession, digits: Data) -> Session:
    """A study whose baseline is trained, so that its head rung is due."""
    session = make_session(**SMALL)
    assert run_next(session, digits).state == "complete"
    return session


def cohort(session: Session, data: Data, **options: Any) -> tuple[Slot, list[Outcome]]:
    """Run the next cohort; the slot it ran on, and how its trials ended."""
    claimed = lease(session)
    assert claimed is not None
    found, outcomes = slot(session, data, claimed), []
    found.lanes = options.pop("lanes", found.lanes)
    outcomes.append(run_alone(found, claimed, on_trial=lambda o: outcomes.append(o), **options))
    return found, outcomes


def test_all_that_wait_are_trained_together_and_written(ready: Session, digits: Data) -> None:
    _, outcomes = cohort(ready, digits)
    assert sorted(o.number for o in outcomes) == list(NUMBERS)
    trials = [t for t in ready.trials() if rung_of(t) == "head"]
    assert {t.state for t in trials} == {TrialState.PRUNED}
    for trial in trials:
        attrs = trial.user_attrs
        assert trial.values == [attrs["metrics"]["adjusted"]["tail_accuracy"]]
        assert {"recipe", "digest", "kappa", "tau", "loss", "sampler"} <= attrs.keys()
        assert "constraints:floor" in trial.system_attrs
    assert len({a["token"] for a in ready.ledger.attempts()}) == 25
    assert all(a["end"] is not None for a in ready.ledger.attempts())


def test_cohort_trains_on_the_device_of_its_slot(
    ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = []

    def noted(*arguments: Any, device: str, **options: Any) -> Iterator[tuple[int, HeadResult]]:
        devices.append(device)
        yield from train_heads(*arguments, device=device, **options)

    monkeypatch.setattr(head, "train_heads", noted)
    found, _ = cohort(ready, digits)
    assert devices == [found.device]


@pytest.mark.gpu
def test_cohort_trains_on_the_gpu(ready: Session, digits: Data) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    claimed = lease(ready)
    assert claimed is not None
    found = slot(ready, digits.to("cuda"), claimed)
    found.device = "cuda"
    run_alone(found, claimed)
    assert found.backbone is not None
    assert found.backbone.features.train.is_cuda
    trials = [t for t in ready.trials() if rung_of(t) == "head"]
    assert {(t.state, t.user_attrs["reason"]) for t in trials} == {(TrialState.PRUNED, "head")}
    assert max(t.user_attrs["metrics"]["adjusted"]["accuracy"] for t in trials) > 0.4


def test_at_most_as_many_as_the_slot_has_lanes_are_taken(ready: Session, digits: Data) -> None:
    _, outcomes = cohort(ready, digits, lanes=5)
    assert len(outcomes) == 5
    assert len(ready.trials(TrialState.WAITING)) == 19


def test_workers_share_the_rung_evenly_so_that_all_end_together(
    ready: Session, digits: Data
) -> None:
    for name in ("one", "two", "three"):
        ready.ledger.register(name, facts("cpu"))
    sizes = [len(cohort(ready, digits)[1]) for _ in range(2)]
    assert sizes == [8, 6], "a third of 24, and of the 16 left"
    for name in ("two", "three"):
        ready.ledger.leave((name, 1))
    assert len(cohort(ready, digits)[1]) == 10


def test_results_do_not_depend_on_the_company(make_session: MakeSession, digits: Data) -> None:
    values = []
    for name, lanes in (("together", 24), ("by fives", 5)):
        session = make_session(**SMALL | {"name": name, "search": {"algorithm": "random"}})
        run_next(session, digits)
        while any(rung_of(t) == "head" for t in session.trials(TrialState.WAITING)):
            cohort(session, digits, lanes=lanes)
        values.append(
            {t.number: (t.params, t.values) for t in session.trials() if t.number in NUMBERS}
        )
    assert values[0] == values[1]


def test_cohort_that_is_told_to_stop_puts_back_what_it_did_not_train(
    ready: Session, digits: Data
) -> None:
    cohort(ready, digits, lanes=1)
    asked = iter(range(10**9))
    _, outcomes = cohort(ready, digits, stop=lambda: next(asked) > 3)
    assert Counter(o.state for o in outcomes)["interrupted"] > 0
    back = ready.trials(TrialState.WAITING)
    assert len(back) == Counter(o.state for o in outcomes)["interrupted"]
    assert all(t.params == {} for t in back), "nothing is left of a proposal that was not trained"
    assert not ready.trials(TrialState.RUNNING)
    cohort(ready, digits)
    assert not ready.trials(TrialState.WAITING)


def test_cohort_stopped_by_an_order_says_which_in_its_record(
    ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ordered(*arguments: Any, **options: Any) -> Iterator[tuple[int, HeadResult]]:
        order = ready.ledger.give_order("stop", "asked for", "repair")
        busy.pulse.hear(order)
        yield from train_heads(*arguments, **options)

    claimed = lease(ready)
    assert claimed is not None
    busy = slot(ready, digits, claimed)
    monkeypatch.setattr(head, "train_heads", ordered)
    outcome = run_alone(busy, claimed)
    assert (outcome.state, outcome.reason) == ("interrupted", "stop: asked for")
    ends = {(a["end"], a["reason"]) for a in ready.ledger.attempts()}
    assert ends == {("complete", None), ("preempted", "stop: asked for")}
    assert len(ready.trials(TrialState.WAITING)) == 24


def test_trials_of_a_cohort_that_others_got_meanwhile_are_theirs(
    ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def slow(*arguments: Any, **options: Any) -> Iterator[tuple[int, HeadResult]]:
        yield from train_heads(*arguments, **options)
        running = ready.trials(TrialState.RUNNING)
        for attempt in ready.ledger.attempts():
            if attempt["trial_id"] == running[3]._trial_id and attempt["holds"]:
                ready.ledger.reap([(attempt["worker_id"], attempt["generation"])], overdue=False)
        taken.extend(t.number for t in ready.trials(TrialState.WAITING))

    monkeypatch.setattr(head, "train_heads", slow)
    _, outcomes = cohort(ready, digits)
    assert len(taken) == 24, "the worker was held to be dead"
    assert {o.state for o in outcomes} == {"lost"}
    monkeypatch.setattr(head, "train_heads", train_heads)
    cohort(ready, digits)
    assert Counter(t.state for t in ready.trials() if t.number in NUMBERS) == {
        TrialState.PRUNED: 24
    }


def test_out_of_memory_the_slot_goes_on_with_fewer_lanes(
    ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(recipes: Any, *arguments: Any, lanes: int, **options: Any) -> Any:
        if lanes > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_heads(recipes, *arguments, lanes=lanes, **options)

    monkeypatch.setattr(head, "train_heads", small)
    found, outcomes = cohort(ready, digits, lanes=24)
    assert found.lanes == 6
    assert len(outcomes) == 6
    assert {o.state for o in outcomes} == {"pruned"}
    assert len(ready.trials(TrialState.WAITING)) == 18


def test_an_error_fails_one_trial_and_puts_the_others_back(
    ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("nothing to train")

    monkeypatch.setattr(head, "train_heads", broken)
    _, outcomes = cohort(ready, digits)
    assert [(o.state, o.reason) for o in outcomes] == [("failed", "code_error")]
    assert len(ready.trials(TrialState.WAITING)) == 23
    for _ in range(2):
        cohort(ready, digits)
    order = ready.ledger.order()
    assert (order.state, order.reason) == ("stop", "code_error")
    assert "nothing to train" in str(order.detail)


def test_recipe_that_raises_fails_alone_and_those_beside_it_are_trained(
    ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = 7

    def one_raises(session: Session, trial: Any, *arguments: Any) -> Recipe:
        if trial.number == bad:
            raise ZeroDivisionError("no such margin")
        return resolve(session, trial, *arguments)

    monkeypatch.setattr(head, "resolve", one_raises)
    ends: dict[int, tuple[str, str | None]] = {}
    while len(ends) < len(NUMBERS):
        _, outcomes = cohort(ready, digits)
        ends |= {o.number: (o.state, o.reason) for o in outcomes}
    assert ends == {
        n: ("failed", "code_error") if n == bad else ("pruned", "head") for n in NUMBERS
    }
    assert ready.ledger.order().state == "run"


def test_classifier_that_diverged_is_not_finite_and_its_neighbours_are_well(
    ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_diverges(*arguments: Any, **options: Any) -> Iterator[tuple[int, HeadResult]]:
        from dataclasses import replace

        for index, result in train_heads(*arguments, **options):
            bad = torch.full_like(result.logits, torch.nan)
            yield index, replace(result, logits=bad, diverged=True) if index == 2 else result

    monkeypatch.setattr(head, "train_heads", one_diverges)
    _, outcomes = cohort(ready, digits)
    reasons = {o.number: o.reason for o in outcomes}
    assert reasons == {n: "not_finite" if n == 3 else "head" for n in NUMBERS}


def _work(make: MakeSession, data: Data, sign: Any) -> None:
    def told(*arguments: Any, **options: Any) -> Iterator[tuple[int, HeadResult]]:
        sign.set()
        yield from train_heads(*arguments, **options)
        signal.pause()

    head.__dict__["train_heads"] = told
    work(make(**SMALL), data)


def test_trials_of_a_killed_worker_are_trained_by_the_next_one_and_counted_once(
    make_session: MakeSession, digits: Data
) -> None:
    context = multiprocessing.get_context("fork")
    sign = context.Event()
    process = context.Process(target=_work, args=(make_session, digits, sign))
    process.start()
    assert sign.wait(60)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    session = make_session(**SMALL)
    work(session, digits)
    trials = session.trials()
    assert Counter(rung_of(t) for t in trials) == {"head": 24, "full": 6}
    assert all(t.state.is_finished() for t in trials)
    ends = Counter(a["end"] for a in session.ledger.attempts())
    assert ends["lost"] == 24
    assert len(session.ledger.attempts()) == 24 + 30


def test_cheap_rung_alone_gives_a_model_whose_metrics_are_the_stored_ones(
    make_session: MakeSession, digits: Data, tmp_path: Any
) -> None:
    session = make_session(**ALONE)
    work(session, digits)
    trials = [t for t in session.trials(TrialState.COMPLETE) if rung_of(t) == "head"]
    assert len(trials) == 12
    best = max(trials, key=lambda t: t.values[0])
    lane = trained_lane(session, best, digits, "cpu")
    logits = lane.logits(digits.validation.images)
    found = assess_validation(logits, digits, stored_recipe(best))
    for name, value in best.user_attrs["metrics"]["raw"].items():
        assert found.raw[name] == pytest.approx(value, abs=0.02), name
    verdict = decide(session, digits)
    assert verdict is not None
    top = session.best()
    assert top is not None
    files = export(session, digits, tmp_path / "best", number=top.number)
    assert all(path.exists() for path in files)


def test_weights_that_are_gone_are_made_again_from_backbone_and_features(
    make_session: MakeSession, digits: Data
) -> None:
    session = make_session(**ALONE)
    work(session, digits)
    trial = next(t for t in session.trials(TrialState.COMPLETE) if rung_of(t) == "head")
    first = trained_lane(session, trial, digits, "cpu").logits(digits.validation.images)
    session.trial_store(trial.number).remove("model.safetensors")
    again = trained_lane(session, trial, digits, "cpu").logits(digits.validation.images)
    assert again.equal(first)


def test_lease_of_the_first_trial_lost_means_the_others_are_still_written(
    ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = ready.fenced.finish_all

    def first_is_lost(endings: Any) -> Any:
        mine, *rest = endings
        ready.fenced.drop(mine.lease.trial_id)
        return [mine.lease, *written(rest)]

    monkeypatch.setattr(type(ready.fenced), "finish_all", lambda self, e: first_is_lost(e))
    _, outcomes = cohort(ready, digits)
    assert Counter(o.state for o in outcomes) == {"pruned": 23, "lost": 1}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where features are kept: none so far."""
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path / "cache"))
    return trained.features_folder()


def test_stop_while_features_are_made_puts_the_trial_back(
    ready: Session, digits: Data, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "tuner")
    asked = iter(range(10**9))
    _, outcomes = cohort(ready, digits, stop=lambda: next(asked) > 1)
    assert [(o.state, o.reason) for o in outcomes] == [("interrupted", "signal")]
    assert len(ready.trials(TrialState.WAITING)) == 24
    assert not ready.trials(TrialState.RUNNING)
    last = ready.ledger.attempts()[-1]
    assert (last["end"], last["reason"]) == ("preempted", "signal")
    assert not list(cache.glob("*.safetensors"))
    assert f"making features, once for this machine: of {len(digits.train)} images" in caplog.text
    assert len(cohort(ready, digits)[1]) == 24


def test_order_to_stop_is_heard_while_another_process_makes_the_features(
    ready: Session, digits: Data, cache: Path
) -> None:
    cohort(ready, digits, lanes=1)
    [path] = cache.glob("*.safetensors")
    claimed = lease(ready)
    assert claimed is not None
    busy = slot(ready, digits, claimed)
    busy.pulse.hear(ready.ledger.give_order("stop", "asked for", "repair"))
    with alone(path):
        outcome = run_alone(busy, claimed)
    assert (outcome.state, outcome.reason) == ("interrupted", "stop: asked for")
    assert len(ready.trials(TrialState.WAITING)) == 23


@pytest.mark.parametrize("seconds", [60.0, 0.0], ids=["waited for", "trained again"])
def test_stop_is_heard_while_the_backbone_is(
    seconds: float, ready: Session, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "WEIGHTS_SECONDS", seconds)
    ready.trial_store(0).remove("model.safetensors")
    began = time.monotonic()
    _, outcomes = cohort(ready, digits, stop=lambda: True)
    assert [(o.state, o.reason) for o in outcomes] == [("interrupted", "signal")]
    assert time.monotonic() < began + 30
    assert len(ready.trials(TrialState.WAITING)) == 24


def test_backbone_without_weights_is_trained_again_by_one_while_the_others_wait(
    ready: Session, digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "WEIGHTS_SECONDS", 0.0)
    ready.trial_store(0).remove("model.safetensors")
    ready.baseline()
    made, train = list[int](), trained.train

    def slowly(*args: Any) -> Lane:
        made.append(1)
        time.sleep(1)
        return train(*args)

    monkeypatch.setattr(trained, "train", slowly)
    with ThreadPool(3) as pool:
        found = pool.map(lambda _: trained.backbone(ready, digits, "cpu", cache), range(3))
    assert len(made) == 1
    assert all(each.features.train.equal(found[0].features.train) for each in found)


def test_disk_that_is_full_says_where_to_make_room(
    ready: Session, digits: Data, cache: Path
) -> None:
    ready.baseline()
    with files_of_at_most(2**14), pytest.raises(TunerError) as error:
        trained.backbone(ready, digits, "cpu", cache)
    assert f"cannot be kept in {cache} (" in str(error.value)
    assert "make room there, or set TUNER_CACHE" in str(error.value)
    assert not list(cache.glob("*.half"))


@pytest.mark.parametrize("place", ["made", "moved", "moved by the training"])
def test_no_memory_for_features_says_the_ways_out_and_all_trials_wait(
    place: str, ready: Session, digits: Data, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves, to = iter(["moved", "moved by the training"]), Features.to

    def moved(self: Features, device: Any) -> Features:
        if next(moves) == place:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0")
        return to(self, device)

    def made(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    monkeypatch.setattr(Features, "to", moved)
    if place == "made":
        monkeypatch.setattr(_features._Maker, "features", made)
    images = f"features of {len(digits.train)} images, ladder.head.copies = 2, cannot be held"
    with pytest.raises(TunerError, match=rf"{images}.*\(.*allocate.*\); take fewer copies, or"):
        cohort(ready, digits)
    assert len(ready.trials(TrialState.WAITING)) == 24
    assert not ready.trials(TrialState.RUNNING)
