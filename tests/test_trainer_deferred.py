"""Deferred training: one stage one for all recipes that say so, and branches bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_interruption import stopped, through_a_file
from torch import Tensor
from trainer_cases import recipe, trained

from tuner.checkpoint import Snapshot
from tuner.datasets import Data
from tuner.lane import Lane
from tuner.losses import LOSSES, Loss
from tuner.recipe import Recipe
from tuner.trainer import epochs

SWITCH = 2
MIXED = {"name": "standard", "flip": False, "crop_padding": 1, "mixup": 0.4}
SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
ADAMW = {"name": "adamw"}
BALANCED = {"name": "class_aware", "exponent": 1.0}

# What acts before the switch, and recipes that share it.
FAMILIES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "linear head": (
        {"optimizer": SGD},
        [
            {},
            {"loss": {"name": "weighted_cross_entropy"}, "sampler": BALANCED},
            {"loss": {"name": "asymmetric"}},
            {"loss": {"name": "fnr_adaptive"}, "sampler": {"name": "curriculum"}},
            {"loss": {"name": "equalization"}, "sampler": {"name": "progressive"}},
            {"loss": {"name": "weighted_cross_entropy", "start": 0.75}},
        ],
    ),
    "adamw, dropout and mixup": (
        {"optimizer": ADAMW, "model": {"name": "mlp", "dropout": 0.3}, "augment": MIXED},
        [
            {"loss": {"name": "class_balanced"}},
            {"loss": {"name": "fnr_adaptive"}},
            {"loss": {"name": "asymmetric"}, "sampler": BALANCED},
        ],
    ),
    "sigmoid head": (
        {"optimizer": SGD, "augment": MIXED},
        [
            {"loss": {"name": "class_balanced", "base": "sigmoid"}},
            {"loss": {"name": "class_balanced", "base": "focal", "beta": 0.9}, "sampler": BALANCED},
        ],
    ),
    "cosine head and batch norm": (
        {"optimizer": ADAMW, "model": {"name": "small_cnn"}},
        [
            {"loss": {"name": "ldam", "beta": 0.9999}},
            {"loss": {"name": "ldam", "max_margin": 0.2}, "sampler": BALANCED},
        ],
    ),
}
BRANCHES = [
    pytest.param(common, one, other, id=f"{name} {i} from {j}")
    for name, (common, recipes) in FAMILIES.items()
    for i, one in enumerate(recipes)
    for j, other in enumerate(recipes)
    if j == (i + 1) % len(recipes)
]


def deferred(*parts: dict[str, Any], switch: float = 0.5, **more: Any) -> Recipe:
    training = {"name": "deferred", "switch": switch, "batch_size": 64}
    merged = {key: value for each in parts for key, value in each.items()}
    return recipe(**{"training": training, **merged, **more})


def at_the_switch(which: Recipe, data: Data) -> Snapshot:
    for result in epochs(which, data):
        if result.epoch + 1 == which.switch_epoch():
            return result.snapshot()
    raise AssertionError("the switch never came")


@pytest.mark.parametrize(("common", "one", "other"), BRANCHES)
def test_branch_of_another_recipes_stage_one_ends_as_the_whole_training(
    common: dict[str, Any],
    one: dict[str, Any],
    other: dict[str, Any],
    digits: Data,
    tmp_path: Path,
) -> None:
    which = deferred(common, one)
    snapshot = through_a_file(at_the_switch(deferred(common, other), digits), tmp_path)
    rest = list(epochs(which, digits, resume=snapshot))
    assert [result.epoch for result in rest] == [SWITCH, SWITCH + 1]
    assert trained(which, digits).ends_as(rest)


@pytest.mark.parametrize("name", FAMILIES)
def test_recipes_of_a_family_train_alike_before_the_switch_and_differ_after(
    name: str, digits: Data
) -> None:
    common, recipes = FAMILIES[name]
    first = trained(deferred(common, recipes[0]), digits)
    for other in recipes[1:]:
        found = trained(deferred(common, other), digits)
        assert found.losses[:SWITCH] == first.losses[:SWITCH]
        assert torch.equal(found.logits[SWITCH - 1], first.logits[SWITCH - 1])
        assert not torch.equal(found.logits[-1], first.logits[-1])


def test_what_two_recipes_leave_at_the_switch_is_the_same(digits: Data) -> None:
    one, other = (
        at_the_switch(deferred(parts), digits)
        for parts in ({}, {"loss": {"name": "fnr_adaptive"}, "sampler": {"name": "curriculum"}})
    )
    assert one.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert {**one.meta, "recipe": ""} == {**other.meta, "recipe": ""}


def test_branch_may_also_begin_within_stage_one(digits: Data, tmp_path: Path) -> None:
    which, other = deferred({"loss": {"name": "focal"}}), deferred({"sampler": BALANCED})
    _, interruption = stopped(other, digits, 3)
    snapshot = through_a_file(interruption.snapshot, tmp_path)
    assert trained(which, digits).ends_as(list(epochs(which, digits, resume=snapshot)))


def test_branched_training_is_interrupted_and_goes_on_as_any_other(
    digits: Data, tmp_path: Path
) -> None:
    which = deferred({"loss": {"name": "fnr_adaptive"}, "sampler": BALANCED})
    branch = at_the_switch(deferred(), digits)
    _, interruption = stopped(which, digits, 2, resume=branch)
    assert interruption.epoch == SWITCH
    snapshot = through_a_file(interruption.snapshot, tmp_path)
    assert snapshot.meta["recipe"] == which.digest(), "it is this recipe's own by now"
    assert trained(which, digits).ends_as(list(epochs(which, digits, resume=snapshot)))


def test_momentum_runs_on_through_the_switch(digits: Data) -> None:
    lane = Lane(deferred({"optimizer": SGD, "loss": {"name": "focal"}}), digits, "cpu")
    lane.begin_epoch()
    for indices, images in lane.images(lane.plan()[:1]):
        lane.step(indices, images, share=0.5)
    optimizer, momentum = lane.optimizer, momentum_of(lane)
    lane.epoch = SWITCH
    lane.begin_epoch()
    assert lane.optimizer is optimizer
    assert momentum.any()
    assert torch.equal(momentum_of(lane), momentum)


def test_second_stage_trains_with_the_recipes_own_loss_and_sampler(digits: Data) -> None:
    which = deferred({"loss": {"name": "weighted_cross_entropy"}, "sampler": BALANCED})
    lane = Lane(which, digits, "cpu")
    lane.begin_epoch()
    natural = torch.arange(len(digits.train))
    assert type(lane.loss) is type(built("cross_entropy", digits))
    assert torch.equal(torch.cat(lane.plan()).sort().values, natural)
    lane.epoch = SWITCH
    lane.begin_epoch()
    assert lane.loss.weights(digits.train.targets) is not None
    assert not torch.equal(torch.cat(lane.plan()).sort().values, natural)


def test_start_of_a_loss_is_a_share_of_the_whole_training(digits: Data) -> None:
    lane = Lane(
        deferred({"loss": {"name": "weighted_cross_entropy", "start": 0.75}}), digits, "cpu"
    )
    weights = []
    for lane.epoch in range(4):
        lane.begin_epoch()
        weights.append(lane.loss.weights(digits.train.targets))
    assert [found is not None for found in weights] == [False, False, False, True]


def test_switch_within_an_epoch_acts_from_the_next_one_on(digits: Data) -> None:
    which = deferred({"loss": {"name": "focal"}}, switch=0.6)
    assert which.switch_epoch() == 3
    lane = Lane(which, digits, "cpu")
    stages = []
    for lane.epoch in range(4):
        lane.begin_epoch()
        stages.append(lane.stage)
    assert stages == [0, 0, 0, 1]


@pytest.mark.parametrize("sampler", [{"name": "natural"}, {"name": "class_aware", "exponent": 0.0}])
@pytest.mark.parametrize("loss", [{"name": "cross_entropy"}, {"name": "ldam", "max_margin": 0.0}])
def test_deferring_nothing_is_training_in_one_stage(
    loss: dict[str, Any], sampler: dict[str, Any], digits: Data
) -> None:
    parts: dict[str, Any] = {"loss": loss, "sampler": sampler, "model": {"name": "small_cnn"}}
    single, idle = recipe(**parts), deferred(parts)
    assert idle.digest() == single.digest()
    assert idle.settled() == single.settled()
    whole = trained(single, digits)
    assert whole.ends_as(list(epochs(idle, digits)))
    for one, other in ((single, idle), (idle, single)):
        results = epochs(one, digits)
        for _ in range(SWITCH + 1):
            snapshot = next(results).snapshot()
        assert whole.ends_as(list(epochs(other, digits, resume=snapshot)))


def test_snapshot_that_is_nothing_to_branch_from_is_refused_with_the_reason(digits: Data) -> None:
    which = deferred({"loss": {"name": "focal"}})
    whole = at_the_switch(deferred(), digits)
    assert which.refusal(whole.meta) is None
    for other in (deferred(seed=8), deferred({"optimizer": ADAMW}), deferred(switch=0.75)):
        with pytest.raises(ValueError, match="differs before the switch: its stage one is"):
            list(epochs(which, digits, resume=at_the_switch(other, digits)))
    _, late = stopped(deferred({"sampler": BALANCED}), digits, 2, resume=whole)
    with pytest.raises(ValueError, match="taken after its switch: both are the same only before"):
        list(epochs(which, digits, resume=late.snapshot))
    for one, other in ((which, recipe()), (recipe(loss={"name": "focal"}), deferred())):
        with pytest.raises(ValueError, match="the snapshot belongs to another recipe$"):
            list(epochs(one, digits, resume=next(epochs(other, digits)).snapshot()))


@pytest.mark.parametrize("name", list(LOSSES))
def test_plain_form_of_every_loss_is_cross_entropy_on_the_same_logits(
    name: str, digits: Data
) -> None:
    component = LOSSES[name]()
    plain = component.plain()
    assert plain.plain() == plain == plain.canonical()
    assert (plain.head, plain.output_scale()) == (component.head, component.output_scale())
    targets = digits.train.targets[:64]
    outputs = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    ours = plain.build(digits.class_counts).per_sample(outputs, targets)
    logits = outputs * component.output_scale()
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ours, expected)


def momentum_of(lane: Lane) -> Tensor:
    return lane.snapshot().tensors["optimizer/state.0.momentum_buffer"]


def built(name: str, data: Data) -> Loss:
    return LOSSES[name]().build(data.class_counts)
