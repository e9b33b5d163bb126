"""Epochs of a sampler have as many images for every sampler; passes need not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tuner.imbalance import Groups
from tuner.samplers import SAMPLERS, ClassAware, ClassSampler, Natural, SamplerComponent

COUNTS = (200, 60, 20, 5)
GROUPS = Groups(head=(0,), medium=(1,), tail=(2, 3))
LONG = ClassAware(epoch_length="keep_head")
SHORT = ClassAware(exponent=0.0, head_cap=4.0, epoch_length="keep_head")
ALL = [
    *(SAMPLERS[name]() for name in SAMPLERS),
    LONG,
    SHORT,
    ClassAware(exponent=0.5, tail_factor=3.0, epoch_length="keep_head", start=0.4),
]


def targets_with(counts: tuple[int, ...]) -> Tensor:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]


TARGETS = targets_with(COUNTS)


def built(component: SamplerComponent) -> ClassSampler:
    return component.build(TARGETS, seed=3, groups=GROUPS)


@pytest.mark.parametrize("component", ALL, ids=repr)
def test_every_epoch_has_as_many_images_as_there_are(component: SamplerComponent) -> None:
    sampler = built(component)
    for number in range(10):
        epoch = sampler.epoch(number / 10)
        assert len(epoch) == len(TARGETS)
        sampler.observe(epoch, epoch.float().sin())


@pytest.mark.parametrize("component", ALL, ids=repr)
def test_epochs_are_passes_where_these_are_as_long(component: SamplerComponent) -> None:
    one, other = built(component), built(component)
    for progress in (0.0, 0.2, 0.8):
        if one.num_draws(progress) == len(TARGETS):
            assert torch.equal(one.epoch(progress), other.one_pass(progress))


@pytest.mark.parametrize("component", [LONG, SHORT], ids=["long", "short"])
def test_image_returns_only_after_its_class_was_shown_whatever_the_length_of_passes(
    component: SamplerComponent,
) -> None:
    sampler = built(component)
    assert sampler.num_draws(0.0) != len(TARGETS)
    shown = torch.cat([sampler.epoch(0.0) for _ in range(8)])
    for c, n in enumerate(COUNTS):
        images = shown[TARGETS[shown] == c]
        assert len(images) > 2 * n
        turns = images[: len(images) // n * n].view(-1, n).sort(1).values
        assert (turns == torch.argwhere(TARGETS.eq(c)).flatten()).all()


def test_length_of_a_pass_changes_no_epoch() -> None:
    for component in (LONG, SHORT):
        one, other = built(component), built(replace(component, epoch_length="natural"))
        assert component.canonical() == replace(component, epoch_length="natural").canonical()
        for _ in range(3):
            assert torch.equal(one.epoch(0.0), other.epoch(0.0))


def test_ordinary_iteration_is_a_pass() -> None:
    sampler = built(LONG)
    assert len(list(sampler)) == len(sampler) == 800
    assert len(sampler.epoch(1.0)) == len(TARGETS)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_of_an_epoch_are_the_epoch_of_one(world_size: int) -> None:
    alone = built(SHORT)
    ranks = [
        SHORT.build(TARGETS, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    for _ in range(3):
        merged = torch.zeros(len(TARGETS), dtype=torch.int64)
        for rank, sampler in enumerate(ranks):
            merged[rank::world_size] = sampler.epoch(0.0)
        assert torch.equal(merged, alone.epoch(0.0))


@pytest.mark.parametrize("component", [Natural(), ClassAware(), LONG, SHORT], ids=repr)
def test_repeats_and_unseen_images_are_those_of_an_epoch(component: SamplerComponent) -> None:
    sampler = built(component)
    drawn, missed, epochs = torch.zeros(4), torch.zeros(4), 200
    for _ in range(epochs):
        epoch = sampler.epoch(0.0)
        drawn += TARGETS[epoch].bincount(minlength=4)
        seen = epoch.bincount().nonzero().flatten()
        missed += 1 - TARGETS[seen].bincount(minlength=4) / torch.tensor(COUNTS)
    repeats = (drawn / epochs / torch.tensor(COUNTS)).tolist()
    assert repeats == pytest.approx(sampler.expected_repeats(0.0).tolist(), rel=0.03)
    assert (missed / epochs).tolist() == pytest.approx(sampler.unseen_share(0.0).tolist(), abs=0.02)
