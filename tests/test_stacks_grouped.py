"""Lanes in lockstep: each is trained as step by step, and knows nothing of its neighbours."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from replayed import HostGraphs, Replaying
from test_trainer_interruption import stopped, through_a_file
from trainer_cases import VARIED, Trained, recipe, trained

from tuner.backends import speeds
from tuner.datasets import Data
from tuner.errors import NonFiniteError
from tuner.lane import Lane
from tuner.recipe import Recipe
from tuner.stacks import Stacks, _together
from tuner.steps import _seated, steps_of
from tuner.trainer import EpochResult, epochs, epochs_in_turns

SEATS = 4
GROUPED: dict[str, Any] = {"execution": "grouped", "seats": SEATS}
SHORT: dict[str, Any] = {"length": 2, "training": {"batch_size": 64}}
SPARING = {"name": "equalization", "threshold": 0.1}
SIGMOID = {"name": "class_balanced", "base": "sigmoid"}
CNN: dict[str, Any] = {"model": {"name": "small_cnn"}, **SHORT}
CASES: dict[str, dict[str, Any]] = {
    **{n: p for n, p in VARIED.items() if n not in ("dropout", "fnr-adaptive with mixup")},
    "sigmoid": {"loss": SIGMOID, "optimizer": {"name": "sgd", "nesterov": True}},
    "focal": {"loss": {"name": "focal"}, "optimizer": {"name": "sgd", "momentum": 0.0}},
    "smoothed": {"loss": {"name": "asymmetric"}, "sampler": {"name": "class_aware"}},
    "crops": {"augment": {"name": "standard", "flip": False, "crop_padding": 1}},
    "contiguous": {**CNN, "training": {"batch_size": 64, "layout": "contiguous"}},
}
RESNET: dict[str, Any] = {"model": {"name": "resnet20"}, **SHORT}
"""On a processor grouped convolutions in float64 take seconds; ``test_twins`` looks at one step."""
MIXED: list[dict[str, Any]] = [
    {"loss": SPARING, "sampler": {"name": "class_aware", "exponent": 1.0}},
    {"loss": {"name": "fnr_adaptive"}, "optimizer": {"name": "sgd", "lr": 0.02}},
    {"loss": SIGMOID, "optimizer": {"name": "sgd", "momentum": 0.5, "nesterov": True}},
    {"loss": {"name": "label_smoothing"}, "length": 3},
    {"loss": {"name": "vector_scaling", "start": 0.5}, "length": 2},
    {"loss": {"name": "focal"}},
]


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Replaying:
    return Replaying.by(monkeypatch)


@pytest.fixture
def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tuner.trainer.Lane", partial(Lane, dtype=torch.float64))


def stacks() -> Stacks:
    return Stacks(lambda _: HostGraphs())


def in_company(
    recipes: Sequence[Recipe], data: Data, *, lanes: int = SEATS, **options: Any
) -> list[list[EpochResult]]:
    """Results of recipes that are trained side by side, so many at a time, by turns."""
    results: list[list[EpochResult]] = [[] for _ in recipes]
    waiting = list(enumerate(recipes))
    running: dict[int, Iterator[EpochResult | None]] = {}
    while waiting or running:
        while waiting and len(running) < lanes:
            place, which = waiting.pop(0)
            running[place] = epochs_in_turns(which, data, **{**GROUPED, **options})
        for place, training in list(running.items()):
            try:
                result = next(training)
            except (StopIteration, NonFiniteError):
                del running[place]
            else:
                results[place] += [result] if result is not None else []
        time.sleep(0)
    return results


def grouped(which: Recipe, data: Data, **options: Any) -> Trained:
    """Trained with nobody in the other seats."""
    return trained(which, data, stacks=stacks(), **{**GROUPED, **options})


@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("parts", CASES.values(), ids=CASES.keys())
def test_twin_trains_what_single_steps_train(
    parts: dict[str, Any], digits: Data, replaying: Replaying
) -> None:
    which = recipe(**parts)
    plainly = trained(which, digits, execution="plain")
    plainly.ends_near(list(epochs(which, digits, **GROUPED)), 1e-9)
    assert {stack.seats for stack in replaying.stacks.stacks} == {SEATS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_lane_ends_alike_alone_and_beside_losses_of_all_families(
    dtype: torch.dtype, digits: Data, replaying: Replaying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.trainer.Lane", partial(Lane, dtype=dtype))
    recipes = [recipe(**parts) for parts in MIXED]
    for which, results in zip(recipes, in_company(recipes, digits), strict=True):
        assert grouped(which, digits).ends_as(results)
    (stack,) = replaying.stacks.stacks
    assert stack.seats == SEATS, "all had seats in one stack"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_network_with_batch_norm_ends_alike_in_every_seat_and_whenever_it_came(
    dtype: torch.dtype, digits: Data, replaying: Replaying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.trainer.Lane", partial(Lane, dtype=dtype))
    which = recipe(**CNN)
    expected = grouped(which, digits)
    others = [recipe(**CNN, loss=loss) for loss in (SIGMOID, {"name": "focal"})]
    longer = recipe(**{**CNN, "length": 3}, optimizer={"name": "sgd", "lr": 0.01})
    order = [which, *others, longer, which]
    for place, results in enumerate(in_company(order, digits)):
        assert order[place] is not which or expected.ends_as(results), place


def test_neighbour_that_diverges_is_not_noticed(digits: Data, replaying: Replaying) -> None:
    wild = recipe(**CNN, optimizer={"name": "sgd", "lr": 1e30})
    which = recipe(**CNN)
    expected = grouped(which, digits)
    lost, *found = in_company([wild, which, wild, which, which], digits)
    assert not lost
    assert all(expected.ends_as(found[i]) for i in (0, 2, 3))


def test_seats_are_overwritten_and_nothing_is_recorded_anew(
    digits: Data, replaying: Replaying
) -> None:
    recipes = [recipe(**parts) for parts in MIXED]
    in_company(recipes, digits)
    before = replaying.recorded
    found = in_company(recipes[::-1] + recipes, digits)
    assert replaying.recorded == before
    for which, results in list(zip(recipes[::-1] + recipes, found, strict=True))[::4]:
        assert grouped(which, digits).ends_as(results)


@pytest.mark.parametrize("name", ["batch norm and cosine head", "deferred with running rates"])
def test_lane_of_a_group_goes_on_where_it_was_stopped(
    name: str,
    digits: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replaying: Replaying,
) -> None:
    monkeypatch.setattr(_seated, "CHUNK", 2)
    which = recipe(**VARIED[name])
    whole = grouped(which, digits)
    for asked in (1, 5, 9):
        _, interruption = stopped(which, digits, asked, **GROUPED)
        snapshot = through_a_file(interruption.snapshot, tmp_path)
        beside = [recipe(**MIXED[5]), recipe(**VARIED[name], optimizer={"name": "sgd", "lr": 0.3})]
        own = epochs_in_turns(which, digits, resume=snapshot, **GROUPED)
        others = [epochs_in_turns(each, digits, **GROUPED) for each in beside]
        results = []
        for result in own:
            results += [result] if result is not None else []
            for other in others:
                next(other, None)
        assert whole.ends_as(results), f"stopped in epoch {interruption.epoch}"


def test_lanes_without_a_twin_take_seats_of_their_own(digits: Data, replaying: Replaying) -> None:
    dropout = recipe(model={"name": "mlp", "dropout": 0.3}, length=2)
    mixing = {"name": "standard", "flip": False, "crop_padding": 1, "mixup": 0.4}
    alone = trained(dropout, digits, stacks=stacks())
    first, second = in_company([dropout, recipe(augment=mixing, length=2)], digits)
    assert alone.ends_as(first)
    assert second
    assert {stack.seats for stack in replaying.stacks.stacks} == {1}


def test_twin_that_cannot_be_recorded_leaves_its_lanes_seats_of_their_own(
    digits: Data, replaying: Replaying, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(_together, "_reasons", {})
    alone = trained(recipe(**CNN), digits, stacks=stacks())
    monkeypatch.setattr(_together.Together, "logits", fail)
    for _ in range(2):
        assert alone.ends_as(list(epochs(recipe(**CNN), digits, **GROUPED)))
    assert [stack.seats for stack in replaying.stacks.stacks] == [1]


def test_mixing_that_ends_takes_its_lane_into_the_group(digits: Data, replaying: Replaying) -> None:
    mixing = {"name": "standard", "flip": False, "crop_padding": 1, "mixup": 0.4}
    which = recipe(augment={**mixing, "mix_until": 0.5})
    taken = []
    for _ in epochs(which, digits, **GROUPED):
        stack = replaying.made[-1].stack
        assert stack is not None
        taken.append(stack.seats)
    assert taken == [1, 1, SEATS, SEATS]


@pytest.fixture(scope="module")
def on_device(digits: Data) -> Data:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return digits.to("cuda")


ON_GPU: dict[str, Any] = {"device": "cuda", **GROUPED}
HALF: dict[str, Any] = {**CNN, "training": {"batch_size": 64, "precision": "bfloat16"}}


@pytest.mark.gpu
@pytest.mark.usefixtures("exactly")
@pytest.mark.parametrize("parts", [*CASES.values(), RESNET], ids=[*CASES.keys(), "resnet"])
def test_twin_on_a_gpu_trains_what_single_steps_train(
    parts: dict[str, Any], on_device: Data
) -> None:
    which, own = recipe(**parts), Stacks()
    plainly = trained(which, on_device, device="cuda", execution="plain")
    plainly.ends_near(list(epochs(which, on_device, stacks=own, **ON_GPU)), 1e-8)
    assert {stack.seats for stack in own.stacks} == {SEATS}


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [{}, CNN, HALF], ids=["mlp", "cnn", "cnn in bfloat16"])
def test_lane_on_a_gpu_ends_alike_in_every_seat_beside_anybody(
    parts: dict[str, Any], on_device: Data
) -> None:
    which = recipe(**parts)
    wild = recipe(**parts, optimizer={"name": "sgd", "lr": 1e30})
    others = [recipe(**parts, loss=loss) for loss in (SPARING, SIGMOID, {"name": "focal"})]
    expected = trained(which, on_device, **ON_GPU)
    order = [which, *others, which, wild, which, which]
    for place, results in enumerate(in_company(order, on_device, stacks=Stacks(), **ON_GPU)):
        assert order[place] is not which or expected.ends_as(results), place


@pytest.mark.gpu
@pytest.mark.parametrize("seats", [1, SEATS])
def test_seats_on_a_gpu_are_overwritten_and_nothing_is_captured_anew(
    seats: int, on_device: Data
) -> None:
    options, own = {**ON_GPU, "seats": seats}, Stacks()
    recipes = [recipe(**CNN, loss=loss) for loss in ({"name": "focal"}, {"name": "ldam"}, SIGMOID)]
    recipes = [r for r in recipes if r.loss.head == "linear"]
    for which in recipes:
        trained(which, on_device, stacks=own, **options)
    (stack,) = own.stacks
    graphs, memory = list(stack.recorded.values()), torch.cuda.memory_allocated()
    for which in recipes * 3:
        expected = trained(which, on_device, stacks=Stacks(), **options)
        assert expected.ends_as(list(epochs(which, on_device, stacks=own, **options)))
    assert list(stack.recorded.values()) == graphs
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= memory + 2**20


@pytest.mark.gpu
def test_lane_of_a_group_on_a_gpu_goes_on_where_it_was_stopped(
    on_device: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_seated, "CHUNK", 2)
    which = recipe(**VARIED["batch norm and cosine head"])
    whole = trained(which, on_device, **ON_GPU)
    for asked in (1, 5, 9):
        _, interruption = stopped(which, on_device, asked, **ON_GPU)
        snapshot = through_a_file(interruption.snapshot, tmp_path)
        rest = list(epochs(which, on_device, resume=snapshot, **ON_GPU))
        assert whole.ends_as(rest), f"stopped in epoch {interruption.epoch}"


@pytest.mark.gpu
def test_chunk_of_a_group_makes_nobody_wait(on_device: Data) -> None:
    lane = Lane(recipe(**CNN), on_device, "cuda")
    steps = steps_of(lane, "grouped", Stacks(), SEATS)
    lane.begin_epoch()
    batches = lane.plan()
    list(steps.run(batches, 0, None))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(steps.run(batches, 0, None))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.real
def test_probe_measures_groups(
    on_device: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNER_CACHE", str(tmp_path))
    measured = speeds(recipe(**CNN), on_device, "cuda")
    assert {(s.execution, s.lanes) for s in measured} >= {("grouped", 8), ("graph", 8)}
