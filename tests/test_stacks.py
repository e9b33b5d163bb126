"""A seat is overwritten in place: the next trial of its kind finds everything recorded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replayed import HostGraphs, Replaying
from trainer_cases import Trained, recipe, trained

from tuner.datasets import Data
from tuner.lane import Lane
from tuner.stacks import Stacks
from tuner.stacks._kind import kind_of
from tuner.trainer import epochs

WEIGHTED = {"name": "weighted_cross_entropy", "power": 0.5}
SHIFTED = {"name": "vector_scaling", "gamma": 0.2, "start": 0.5}
FORMS: list[dict[str, Any]] = [{}, {"loss": WEIGHTED}, {"loss": SHIFTED}]
"""Of each form of losses there is a recording: as they are, with weights, with shifts."""
SUCCESSORS: dict[str, dict[str, Any]] = {
    "other rates": {"optimizer": {"name": "sgd", "lr": 0.02, "momentum": 0.5}},
    "no momentum": {"optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.01}},
    "other shifts": {"loss": {"name": "balanced_softmax"}},
    "other weights": {"loss": {**WEIGHTED, "power": 1.0}, "sampler": {"name": "class_aware"}},
    "another schedule": {"schedule": {"name": "step"}},
    "longer": {"length": 5},
}


def stacks() -> Stacks:
    return Stacks(lambda _: HostGraphs())


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> Replaying:
    return Replaying.by(monkeypatch)


@pytest.fixture
def alone(replaying: Replaying, digits: Data) -> Callable[..., Trained]:
    """Trains a recipe in stacks of its own."""
    return lambda **parts: trained(recipe(**parts), digits, stacks=stacks())


def identical(a: Trained, b: Trained) -> bool:
    pairs = zip([*a.logits, *a.weights.values()], [*b.logits, *b.weights.values()], strict=True)
    return a.losses == b.losses and all(torch.equal(x, y) for x, y in pairs)


def test_next_trials_of_the_kind_record_nothing_and_end_as_alone(
    digits: Data, replaying: Replaying, alone: Callable[..., Trained]
) -> None:
    for parts in FORMS:
        trained(recipe(**parts), digits)
    assert replaying.recorded == 2 * len(FORMS)
    for parts in SUCCESSORS.values():
        assert identical(trained(recipe(**parts), digits), alone(**parts))
    assert replaying.recorded == 2 * len(FORMS)
    assert len(replaying.stacks.stacks) == 1


def test_batch_norm_of_the_trial_before_leaves_no_trace(
    digits: Data, replaying: Replaying, alone: Callable[..., Trained]
) -> None:
    parts: dict[str, Any] = {"model": {"name": "small_cnn"}, "length": 2}
    for rate in (0.1, 0.02):
        parts["optimizer"] = {"name": "sgd", "lr": rate}
        assert identical(trained(recipe(**parts), digits), alone(**parts))
    assert replaying.recorded == 2


def test_loss_of_another_family_is_recorded_once_and_then_known(
    digits: Data, replaying: Replaying, alone: Callable[..., Trained]
) -> None:
    sigmoid = {"name": "class_balanced", "base": "sigmoid"}
    rates = {"name": "fnr_adaptive"}
    losses: list[dict[str, Any]] = [WEIGHTED, sigmoid, rates, WEIGHTED, rates, sigmoid]
    counts = []
    for loss in losses:
        # A head bias is a parameter without decay, for all of them here.
        parts: dict[str, Any] = {"loss": loss, "optimizer": {"name": "sgd", "decay_norm": False}}
        assert identical(trained(recipe(**parts), digits), alone(**parts))
        counts.append(replaying.recorded)
    assert counts == [2, 4, 6, 6, 6, 6]


def test_nesterovs_momentum_is_recorded_once_and_then_known(
    digits: Data, replaying: Replaying, alone: Callable[..., Trained]
) -> None:
    for nesterov in (False, True, False, True):
        parts: dict[str, Any] = {"optimizer": {"name": "sgd", "nesterov": nesterov}}
        assert identical(trained(recipe(**parts), digits), alone(**parts))
    assert replaying.recorded == 4


def test_trial_after_one_that_diverged_is_not_touched_by_it(
    digits: Data, replaying: Replaying, alone: Callable[..., Trained]
) -> None:
    with pytest.raises(Exception, match="not finite|loss is"):
        trained(recipe(optimizer={"name": "sgd", "lr": 1e30}), digits)
    assert identical(trained(recipe(), digits), alone())
    assert replaying.recorded == 2


def test_mixed_images_take_a_seat_of_the_same_loss_only(
    digits: Data, replaying: Replaying, alone: Callable[..., Trained]
) -> None:
    mixing = {"name": "standard", "flip": False, "crop_padding": 1, "mixup": 0.4}
    parts: dict[str, Any] = {"augment": mixing, "loss": {"name": "fnr_adaptive"}}
    for rate in (0.1, 0.05):
        parts["optimizer"] = {"name": "sgd", "lr": rate}
        assert identical(trained(recipe(**parts), digits), alone(**parts))
    assert replaying.recorded == 2
    trained(recipe(**{**parts, "loss": {"name": "focal"}}), digits)
    assert replaying.recorded == 2
    assert len(replaying.stacks.stacks) == 1, "the idle stack made room"


def test_lane_that_left_keeps_what_it_had(digits: Data, replaying: Replaying) -> None:
    first = trained(recipe(), digits)
    weights = {name: tensor.clone() for name, tensor in first.weights.items()}
    trained(recipe(optimizer={"name": "sgd", "lr": 0.02}), digits)
    assert all(torch.equal(first.weights[name], weights[name]) for name in weights)
    assert all(steps.stack is None for steps in replaying.made)


def test_stack_goes_with_its_training_where_nobody_keeps_it(
    digits: Data, replaying: Replaying
) -> None:
    own, found = stacks(), []
    gc.disable()
    try:
        for _ in epochs(recipe(length=2), digits, stacks=own):
            found.append(weakref.ref(own.stacks[0]))
        replaying.made.clear()
        own.stacks.clear()
        assert all(stack() is None for stack in found)
    finally:
        gc.enable()


def test_idle_stacks_are_dropped_when_memory_is_needed(digits: Data, replaying: Replaying) -> None:
    trained(recipe(), digits)
    assert replaying.stacks.stacks
    replaying.stacks.free()
    assert not replaying.stacks.stacks


@pytest.mark.parametrize(
    ("augment", "is_alike"),
    [
        ({"mix_until": 0.5}, True),
        ({"remix": True, "tail_strength": 1.0}, True),
        ({"crop_padding": 2}, False),
        ({"mixup": 0.4}, False),
    ],
)
def test_lanes_whose_augmentations_do_the_same_are_of_one_kind(
    augment: dict[str, Any], is_alike: bool, digits: Data
) -> None:
    kinds = []
    for more in ({}, augment):
        lane = Lane(recipe(augment={"name": "standard", **more}), digits, "cpu")
        lane.begin_epoch()
        kinds.append(kind_of(lane))
    assert (kinds[0] == kinds[1]) == is_alike
