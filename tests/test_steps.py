"""CUDA graphs give what single steps give, and lanes side by side what they give alone.

A processor that records and replays shows it without a GPU; the tests after those need one.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from replayed import HostGraphs, Replaying
from test_trainer_interruption import stopped, through_a_file
from torch import Tensor
from trainer_cases import VARIED, Trained, recipe, trained

from tuner.backends import chosen
from tuner.datasets import Data, MappedImages, Part, ResidentImages
from tuner.errors import NonFiniteError
from tuner.lane import Lane
from tuner.losses import CrossEntropyLoss
from tuner.recipe import Recipe
from tuner.stacks import Stacks
from tuner.steps import PlainSteps, SeatedSteps, _seated, steps_of
from tuner.trainer import EpochResult, epochs, epochs_in_turns

on_gpu = pytest.mark.gpu
MIXING = {"name": "standard", "flip": False, "crop_padding": 1, "mixup": 0.4, "cutmix": 1.0}
CASES: dict[str, dict[str, Any]] = {
    **VARIED,
    "mixup and cutmix by turns, until half": {"augment": {**MIXING, "mix_until": 0.5}},
    "bfloat16": {
        "model": {"name": "small_cnn"},
        "training": {"batch_size": 64, "precision": "bfloat16"},
    },
    "resnet": {"model": {"name": "resnet20"}, "loss": {"name": "asymmetric"}, "length": 3},
}


# Norms are not fused on a GPU.
EXACT = {name: parts for name, parts in CASES.items() if name not in ("bfloat16", "fused norms")}


@pytest.fixture(scope="module")
def on_device(digits: Data) -> Data:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return digits.to("cuda")


def test_processors_train_step_by_step(digits: Data) -> None:
    assert isinstance(steps_of(Lane(recipe(), digits, "cpu"), "graph"), PlainSteps)


def test_processor_trains_one_at_a_time_and_asks_no_probe(digits: Data) -> None:
    way = chosen(recipe(), digits, "cpu")
    assert (way.execution, way.lanes) == ("plain", 1)


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Replaying:
    return Replaying.by(monkeypatch)


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let trainings compute in float64."""
    monkeypatch.setattr("tuner.trainer.Lane", partial(Lane, dtype=torch.float64))


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("parts", EXACT.values(), ids=EXACT.keys())
def test_what_is_drawn_ahead_and_replayed_trains_what_single_steps_train(
    parts: dict[str, Any], digits: Data, replaying: Replaying
) -> None:
    which = recipe(**parts)
    plainly = trained(which, digits, execution="plain")
    results = list(epochs(which, digits, execution="graph"))
    plainly.ends_near(results, 1e-9)
    (steps,) = replaying.made
    assert steps.recordable


@pytest.mark.parametrize("parts", CASES.values(), ids=CASES.keys())
def test_what_was_replayed_goes_on_where_it_was_stopped(
    parts: dict[str, Any],
    digits: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replaying: Replaying,
) -> None:
    monkeypatch.setattr(_seated, "CHUNK", 2)
    which = recipe(**parts)
    whole = trained(which, digits)
    for asked in (1, 5, 9):
        _, interruption = stopped(which, digits, asked)
        snapshot = through_a_file(interruption.snapshot, tmp_path)
        rest = list(epochs(which, digits, resume=snapshot))
        assert whole.ends_as(rest), f"stopped in epoch {interruption.epoch}"


def test_step_is_recorded_once_for_each_size_of_batch(digits: Data, replaying: Replaying) -> None:
    lane = Lane(recipe(), digits, "cpu")
    sizes = {len(batch) for batch in lane.plan()}
    list(epochs(recipe(), digits))
    assert replaying.recorded == len(sizes) == 2


def test_step_is_recorded_anew_when_its_loss_needs_more(digits: Data, replaying: Replaying) -> None:
    list(epochs(recipe(**VARIED["deferred sampler and weights"]), digits))
    assert replaying.recorded == 4


def test_epoch_of_which_no_step_is_left_waits_for_the_losses_that_it_began_with(
    digits: Data,
) -> None:
    lane, device = Lane(recipe(), digits, "cpu"), HostGraphs()
    lane.begin_epoch()
    batches = lane.plan()
    steps = SeatedSteps(lane, Stacks(lambda _: device))
    steps.total.fill_(3.0)
    list(steps.run(batches, len(batches), None))
    assert device.marks
    assert all(mark.passed for mark in device.marks)
    assert float(steps.total) == 3.0


@pytest.mark.usefixtures("replaying")
def test_trainings_by_turns_wait_for_nothing_but_their_own_chunks(digits: Data) -> None:
    recipes = [recipe(**parts) for parts in list(CASES.values())[:4]]
    alone = [trained(which, digits) for which in recipes]
    for results, expected in zip(
        side_by_side(recipes[:3], digits, recipes[3:], device="cpu"), alone, strict=True
    ):
        assert expected.ends_as(results)


@on_gpu
@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("parts", EXACT.values(), ids=EXACT.keys())
def test_graphs_train_what_single_steps_train(parts: dict[str, Any], on_device: Data) -> None:
    which = recipe(**parts)
    plainly = trained(which, on_device, device="cuda", execution="plain")
    plainly.ends_near(list(epochs(which, on_device, device="cuda", execution="graph")), 1e-8)


@on_gpu
@pytest.mark.parametrize("parts", CASES.values(), ids=CASES.keys())
def test_step_of_every_kind_is_captured(parts: dict[str, Any], on_device: Data) -> None:
    steps = steps_of(Lane(recipe(**parts), on_device, "cuda"))
    assert isinstance(steps, SeatedSteps)
    steps.lane.begin_epoch()
    list(steps.run(steps.lane.plan(), 0, None))
    assert steps.recordable
    assert steps.stack is not None
    assert steps.stack.recorded


def side_by_side(
    recipes: list[Recipe],
    data: Data,
    late: list[Recipe] | None = None,
    *,
    device: str = "cuda",
) -> list[list[EpochResult]]:
    """Train recipes by turns; each of ``late`` takes the place of one that ended."""
    results: list[list[EpochResult]] = [[] for _ in [*recipes, *(late or [])]]
    waiting = list(enumerate(late or [], len(recipes)))
    running = {i: epochs_in_turns(r, data, device=device) for i, r in enumerate(recipes)}
    while running:
        for i, training in list(running.items()):
            try:
                result = next(training)
            except StopIteration:
                del running[i]
                if waiting:
                    place, which = waiting.pop(0)
                    running[place] = epochs_in_turns(which, data, device=device)
                continue
            if result is not None:
                results[i].append(result)
        time.sleep(1e-4)
    return results


@pytest.fixture(scope="module")
def alone(on_device: Data) -> list[tuple[Recipe, Trained]]:
    which = [recipe(**parts) for parts in CASES.values()]
    return [(one, trained(one, on_device, device="cuda")) for one in which]


@on_gpu
def test_lanes_do_not_depend_on_their_neighbours(
    alone: list[tuple[Recipe, Trained]], on_device: Data
) -> None:
    recipes = [one for one, _ in alone]
    first, late = recipes[:6], recipes[6:]
    for results, (_, expected) in zip(side_by_side(first, on_device, late), alone, strict=True):
        assert expected.ends_as(results)


@on_gpu
def test_lanes_do_not_depend_on_their_order(
    alone: list[tuple[Recipe, Trained]], on_device: Data
) -> None:
    backwards = [one for one, _ in alone[::-1]]
    for results, (_, expected) in zip(side_by_side(backwards, on_device), alone[::-1], strict=True):
        assert expected.ends_as(results)


@on_gpu
def test_neighbour_that_diverges_is_not_noticed(
    alone: list[tuple[Recipe, Trained]], on_device: Data
) -> None:
    which, expected = alone[0]
    wild = epochs_in_turns(recipe(optimizer={"name": "sgd", "lr": 1e30}), on_device, device="cuda")
    own = epochs_in_turns(which, on_device, device="cuda")
    results: list[EpochResult] = []
    failed = False
    for result in own:
        if result is not None:
            results.append(result)
        try:
            next(wild, None)
        except NonFiniteError:
            failed = True
    assert failed
    assert expected.ends_as(results)


@on_gpu
@pytest.mark.parametrize("parts", CASES.values(), ids=CASES.keys())
def test_training_with_graphs_goes_on_where_it_was_stopped(
    parts: dict[str, Any], on_device: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_seated, "CHUNK", 2)
    which = recipe(**parts)
    whole = trained(which, on_device, device="cuda")
    for asked in (1, 5, 9):
        _, interruption = stopped(which, on_device, asked, device="cuda")
        snapshot = through_a_file(interruption.snapshot, tmp_path)
        rest = list(epochs(which, on_device, device="cuda", resume=snapshot))
        assert whole.ends_as(rest), f"stopped in epoch {interruption.epoch}"


@on_gpu
def test_training_begun_on_a_gpu_goes_on_on_a_processor(
    on_device: Data, digits: Data, tmp_path: Path
) -> None:
    for name in ("sgd", "adamw"):
        which = recipe(optimizer={"name": name})
        first = next(epochs(which, on_device, device="cuda"))
        snapshot = through_a_file(first.snapshot(), tmp_path)
        second = next(epochs(which, digits, resume=snapshot))
        back = through_a_file(second.snapshot(), tmp_path)
        again = list(epochs(which, on_device, device="cuda", resume=back))
        assert [second.epoch, *(r.epoch for r in again)] == [1, 2, 3]
        whole = trained(which, on_device, device="cuda")
        torch.testing.assert_close(again[-1].logits, whole.logits[-1], rtol=0, atol=1e-2)


class Curious(CrossEntropyLoss):
    """A loss that looks at its own value on the host."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = super().forward(logits, targets)
        return loss * (2.0 if float(loss.detach()) > 1.0 else 1.0)


class Counting(CrossEntropyLoss):
    """A loss that counts its calls outside of tensors."""

    calls = 0

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(logits, targets) / self.calls


@pytest.mark.usefixtures("replaying")
def test_loss_that_counts_outside_of_tensors_is_trained_step_by_step(
    digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = recipe()
    monkeypatch.setattr(type(which.loss), "build", lambda _, counts: Counting(counts))
    plainly = trained(which, digits, execution="plain")
    assert plainly.ends_as(list(epochs(which, digits, execution="graph")))


@on_gpu
@pytest.mark.parametrize("loss", [Curious, Counting])
def test_loss_that_cannot_be_captured_is_trained_step_by_step(
    loss: type[CrossEntropyLoss], on_device: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(self: object, class_counts: Tensor) -> CrossEntropyLoss:
        return loss(class_counts)

    which = recipe()
    monkeypatch.setattr(type(which.loss), "build", build)
    plainly = trained(which, on_device, device="cuda", execution="plain")
    results = list(epochs(which, on_device, device="cuda", execution="graph"))
    assert plainly.ends_as(results)


@on_gpu
def test_chunk_of_steps_makes_nobody_wait(on_device: Data) -> None:
    lane = Lane(recipe(), on_device, "cuda")
    steps = steps_of(lane)
    lane.begin_epoch()
    batches = lane.plan()
    list(steps.run(batches, 0, None))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(steps.run(batches, 0, None))
    finally:
        torch.cuda.set_sync_debug_mode("default")


PLAIN: dict[str, dict[str, Any]] = {
    "crops": {"augment": {"name": "standard", "crop_padding": 1, "cutout": 2}},
    "images": {"augment": {"name": "none"}},
    "mixed images": {"augment": {**MIXING, "remix": True}},
    "adamw and losses that are noted": {
        "optimizer": {"name": "adamw"},
        "sampler": {"name": "curriculum"},
    },
    "batch norm": {
        "model": {"name": "resnet20"},
        "loss": {"name": "asymmetric"},
        "training": {"batch_size": 64, "precision": "bfloat16"},
    },
}


def in_batches(data: Data) -> Data:
    """The same images, as if they were too many for the device."""
    images = data.train.images
    assert isinstance(images, ResidentImages)
    mapped = MappedImages(images.tensor, torch.arange(len(images))).to("cuda")
    return replace(data.to("cuda"), train=Part(mapped, data.train.targets.to("cuda")))


@on_gpu
@pytest.mark.parametrize("way", ["resident", "in batches", "in small pieces"])
@pytest.mark.parametrize("parts", PLAIN.values(), ids=PLAIN.keys())
def test_plain_step_makes_nobody_wait(
    parts: dict[str, Any], way: str, on_device: Data, digits: Data
) -> None:
    data = in_batches(digits) if way == "in batches" else on_device
    micro_batch = 24 if way == "in small pieces" else None
    lane = Lane(recipe(**parts), data, "cuda", micro_batch=micro_batch)
    lane.begin_epoch()
    batches = lane.plan()
    steps = PlainSteps(lane).run(batches, 0, None)
    # The first step makes what the optimizer keeps.
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert [next(steps) for _ in batches[1:]] == list(range(2, len(batches) + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path))
    return tmp_path


@on_gpu
@pytest.mark.real
def test_probe_finds_that_small_networks_want_company(on_device: Data, cache: Path) -> None:
    way = chosen(recipe(training={"batch_size": 64, "precision": "float32"}), on_device, "cuda")
    assert way.execution == "graph"
    assert way.lanes > 1
    assert (cache / "speeds.json").exists()


@on_gpu
@pytest.mark.real
def test_memory_of_a_training_is_given_back_at_its_end(on_device: Data) -> None:
    which = recipe(model={"name": "resnet20"}, length=1)
    left = []
    for _ in range(4):
        list(epochs(which, on_device, device="cuda"))
        # Every stream has a workspace for matrix products; torch uses 32 streams by turns.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        left.append(torch.cuda.memory_reserved())
    assert left[1:] == left[:1] * 3
