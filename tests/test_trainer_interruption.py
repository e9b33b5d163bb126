"""Stopping within an epoch: training goes on from that very step, bit for bit."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from image_folders import dataset, photos
from trainer_cases import VARIED, recipe, trained

from tuner import checkpoint, chunks, trainer
from tuner.checkpoint import Snapshot
from tuner.datasets import Data, StreamedImages
from tuner.errors import TunerError
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.steps import _seated
from tuner.trainer import EpochResult, Interrupted, epochs


def after(steps: int) -> Callable[[], bool]:
    """A ``stop`` that says yes from so many steps on."""
    calls = itertools.count(1)
    return lambda: next(calls) >= steps


def stopped(
    which: Recipe, data: Data, steps: int, *, resume: Snapshot | None = None, **options: Any
) -> tuple[list[EpochResult], Interrupted]:
    """The epochs that were finished within so many steps, and the interruption after them."""
    results: list[EpochResult] = []
    training = epochs(which, data, resume=resume, stop=after(steps), **options)
    with pytest.raises(Interrupted) as caught:
        results.extend(training)
    return results, caught.value


def through_a_file(snapshot: Snapshot, folder: Path) -> Snapshot:
    checkpoint.save(folder / "snapshot", snapshot.tensors, snapshot.meta)
    return Snapshot(*checkpoint.load(folder / "snapshot"))


def steps_of_an_epoch(which: Recipe, data: Data) -> int:
    return len(Lane(which, data, "cpu").plan())


@pytest.mark.parametrize("parts", VARIED.values(), ids=VARIED.keys())
def test_training_goes_on_from_the_step_it_was_stopped_at(
    parts: dict[str, Any], digits: Data, tmp_path: Path
) -> None:
    which = recipe(**parts)
    whole, length = trained(which, digits), steps_of_an_epoch(which, digits)
    assert length > 3
    for epoch, step in ((0, 1), (0, length - 1), (1, 2), (2, 1), (3, length - 1)):
        results, interruption = stopped(which, digits, epoch * length + step)
        assert [r.epoch for r in results] == list(range(epoch))
        assert (interruption.epoch, interruption.step) == (epoch, step)
        snapshot = through_a_file(interruption.snapshot, tmp_path)
        rest = list(epochs(which, digits, resume=snapshot))
        assert [r.epoch for r in rest] == list(range(epoch, 4))
        assert whole.ends_as(rest), f"stopped in epoch {epoch} after step {step}"


@pytest.mark.parametrize("parts", VARIED.values(), ids=VARIED.keys())
def test_training_stopped_after_every_single_step_ends_the_same(
    parts: dict[str, Any], digits: Data, tmp_path: Path
) -> None:
    which = recipe(**parts)
    length = steps_of_an_epoch(which, digits)
    _, interruption = stopped(which, digits, 2 * length + 1)
    for step in range(2, length):
        snapshot = through_a_file(interruption.snapshot, tmp_path)
        _, interruption = stopped(which, digits, 1, resume=snapshot)
        assert (interruption.epoch, interruption.step) == (2, step)
    rest = list(epochs(which, digits, resume=interruption.snapshot))
    assert trained(which, digits).ends_as(rest)


def test_stop_at_the_last_step_of_an_epoch_finishes_the_epoch(digits: Data) -> None:
    which = recipe()
    length = steps_of_an_epoch(which, digits)
    training = epochs(which, digits, stop=after(length))
    result = next(training)
    assert result.epoch == 0
    rest = list(epochs(which, digits, resume=result.snapshot()))
    assert trained(which, digits).ends_as(rest)


@pytest.fixture
def _validation_of_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation that takes too long to be finished after a request to stop."""
    monkeypatch.setattr(chunks, "EVALUATION_BATCH", 64)
    monkeypatch.setattr(trainer, "SHORT_SECONDS", 0.0)


@pytest.mark.usefixtures("_validation_of_many_batches")
@pytest.mark.parametrize("parts", VARIED.values(), ids=VARIED.keys())
def test_epoch_whose_validation_was_left_out_is_taken_up_at_its_end(
    parts: dict[str, Any], digits: Data, tmp_path: Path
) -> None:
    which = recipe(**parts)
    whole, length = trained(which, digits), steps_of_an_epoch(which, digits)
    # The last step asks too: the second look within validation says stop.
    results, interruption = stopped(which, digits, length + 2)
    assert results == []
    assert (interruption.epoch, interruption.step) == (0, length)
    snapshot = through_a_file(interruption.snapshot, tmp_path)
    _, again = stopped(which, digits, 1, resume=snapshot)
    assert (again.epoch, again.step) == (0, length), "left out once more"
    rest = list(epochs(which, digits, resume=through_a_file(again.snapshot, tmp_path)))
    assert [r.epoch for r in rest] == [0, 1, 2, 3]
    assert whole.ends_as(rest)
    assert rest[0].samples == 0
    assert rest[0].seconds > 0


def test_validation_that_is_almost_done_is_finished(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "EVALUATION_BATCH", 64)
    which = recipe()
    length = steps_of_an_epoch(which, digits)
    results, interruption = stopped(which, digits, length)
    assert [r.epoch for r in results] == [0]
    assert (interruption.epoch, interruption.step) == (1, 1)


def test_stop_is_asked_after_every_step_and_no_for_an_answer_changes_nothing(
    digits: Data,
) -> None:
    which, asked = recipe(), itertools.count()
    results = list(epochs(which, digits, stop=lambda: next(asked) < 0))
    batches = -(-len(digits.validation) // chunks.EVALUATION_BATCH)
    assert next(asked) == 4 * (steps_of_an_epoch(which, digits) + batches - 1)
    assert trained(which, digits).ends_as(results)


def test_snapshot_within_an_epoch_does_not_change_when_training_goes_on(digits: Data) -> None:
    which = recipe(sampler={"name": "curriculum"})
    _, interruption = stopped(which, digits, 2)
    first = list(epochs(which, digits, resume=interruption.snapshot))
    again = list(epochs(which, digits, resume=interruption.snapshot))
    whole = trained(which, digits)
    assert whole.ends_as(first)
    assert whole.ends_as(again)


def test_snapshot_between_epochs_holds_nothing_of_an_epoch(digits: Data) -> None:
    """Checkpoints have kept the form they had before training could stop within an epoch."""
    which = recipe(sampler={"name": "curriculum"})
    _, interruption = stopped(which, digits, 2)
    within = interruption.snapshot
    between = next(epochs(which, digits, resume=within)).snapshot()
    assert set(between.meta) == {"epoch", "stage", "optimizer", "recipe"}
    assert set(within.meta) == {*between.meta, "step"}
    parts = {name.partition("/")[0] for name in between.tensors}
    assert parts == {"model", "loss", "optimizer", "generator", "sampler0"} - {"loss"}
    assert {name.partition("/")[0] for name in within.tensors} == {*parts, "epoch", "noted"}


def test_both_parts_of_an_epoch_account_for_their_time_and_images(digits: Data) -> None:
    which = recipe()
    _, interruption = stopped(which, digits, 2)
    assert interruption.seconds > 0
    first, second = itertools.islice(epochs(which, digits, resume=interruption.snapshot), 2)
    assert first.seconds > 0
    assert first.samples == len(digits.train) - 2 * 64
    assert second.samples == len(digits.train)


def test_interruption_is_no_error_a_user_could_cure(digits: Data) -> None:
    _, interruption = stopped(recipe(), digits, 2)
    assert not isinstance(interruption, TunerError)
    assert str(interruption) == "stopped after step 2 of epoch 0"


def test_interruption_leaves_the_global_generator_alone(digits: Data) -> None:
    which = recipe(**VARIED["dropout"])
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    _, interruption = stopped(which, digits, 2)
    list(epochs(which, digits, resume=interruption.snapshot))
    assert torch.equal(torch.rand(1), expected)


def test_snapshot_within_an_epoch_of_another_recipe_is_refused(digits: Data) -> None:
    _, interruption = stopped(recipe(), digits, 2)
    other = recipe(loss={"name": "focal"})
    with pytest.raises(ValueError, match="another recipe"):
        list(epochs(other, digits, resume=interruption.snapshot))


def test_streamed_images_go_on_from_the_step_and_leave_no_process_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "photos", {"common": 40, "some": 20, "rare": 10})
    source = dataset("image_folder", root="photos", image_size=16)
    data = source.build(tmp_path, resident_limit=0)
    assert isinstance(data.train.images, StreamedImages)
    which = recipe(
        length=2,
        data={"name": "image_folder", "root": "photos", "image_size": 16},
        model={"name": "mlp", "dropout": 0.2},
        training={"batch_size": 8},
        augment={"name": "standard", "mixup": 0.2},
    )
    before = set(multiprocessing.active_children())
    _, interruption = stopped(which, data, 2)
    assert set(multiprocessing.active_children()) <= before, f"while {interruption!r} is alive"
    resumed, interruption = stopped(
        which, data, 2, resume=through_a_file(interruption.snapshot, tmp_path)
    )
    assert resumed == []
    assert interruption.step == 4
    rest = list(epochs(which, data, resume=through_a_file(interruption.snapshot, tmp_path)))
    whole = trained(which, data)
    assert whole.ends_as(rest)
    resident = source.build(tmp_path)
    assert trained(which, replace(resident, mean=data.mean, std=data.std)).ends_as(rest)
    monkeypatch.setattr(chunks, "EVALUATION_BATCH", 8)
    monkeypatch.setattr(trainer, "SHORT_SECONDS", 0.0)
    _, interruption = stopped(which, data, steps_of_an_epoch(which, data))
    assert interruption.step == steps_of_an_epoch(which, data)
    assert set(multiprocessing.active_children()) <= before, f"while {interruption!r} is alive"


@pytest.fixture
def on_device(digits: Data, monkeypatch: pytest.MonkeyPatch) -> Data:
    """Data on a GPU, which asks whether to stop after every step."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.setattr(_seated, "CHUNK", 1)
    return digits.to("cuda")


@pytest.mark.gpu
def test_training_on_the_gpu_goes_on_with_its_own_dropout(on_device: Data, tmp_path: Path) -> None:
    which, data = recipe(**VARIED["dropout"]), on_device
    whole = list(epochs(which, data, device="cuda"))
    _, interruption = stopped(which, data, 3, device="cuda")
    snapshot = through_a_file(interruption.snapshot, tmp_path)
    rest = list(epochs(which, data, device="cuda", resume=snapshot))
    for ours, theirs in zip(rest, whole, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.usefixtures("_validation_of_many_batches")
def test_validation_left_out_on_the_gpu_is_taken_up_with_the_losses_of_its_epoch(
    digits: Data, on_device: Data, tmp_path: Path
) -> None:
    which, data, length = recipe(), on_device, steps_of_an_epoch(recipe(), digits)
    whole = trained(which, data, device="cuda")
    looks = (stopped(which, data, asked, device="cuda")[1] for asked in range(length, 2 * length))
    interruption = next(found for found in looks if found.step == length)
    assert interruption.epoch == 0
    snapshot = through_a_file(interruption.snapshot, tmp_path)
    rest = list(epochs(which, data, device="cuda", resume=snapshot))
    assert [r.epoch for r in rest] == [0, 1, 2, 3]
    assert whole.ends_as(rest)
