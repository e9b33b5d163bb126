"""Samplers against counting, their shards, and their own past."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tuner.checkpoint import CheckpointError
from tuner.errors import DataError
from tuner.imbalance import Groups
from tuner.samplers import (
    ClassAware,
    Curriculum,
    EffectiveNumber,
    Natural,
    Progressive,
    SamplerComponent,
)

COUNTS = (200, 60, 20, 5)
GROUPS = Groups(head=(0,), medium=(1,), tail=(2, 3))
ALL = [
    Natural(),
    ClassAware(),
    ClassAware(exponent=0.5, tail_factor=3.0, head_cap=4.0, start=0.4),
    ClassAware(epoch_length="keep_head"),
    ClassAware(exponent=0.0, head_cap=4.0, epoch_length="keep_head"),
    EffectiveNumber(beta=0.99),
    Progressive(),
    Progressive(reverse=True),
    Curriculum(),
]


def targets_with(counts: tuple[int, ...]) -> Tensor:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]


TARGETS = targets_with(COUNTS)


def members(c: int) -> Tensor:
    return torch.argwhere(TARGETS.eq(c)).flatten()


@pytest.mark.parametrize("component", ALL, ids=repr)
@pytest.mark.parametrize("progress", [0.0, 0.45, 0.95])
def test_drawn_classes_follow_the_probabilities(
    component: SamplerComponent, progress: float
) -> None:
    sampler = component.build(TARGETS, seed=1, groups=GROUPS)
    drawn = sum(TARGETS[sampler.epoch(progress)].bincount(minlength=4) for _ in range(30))
    expected = sampler.class_probabilities(progress) * len(TARGETS) * 30
    assert chisquare(torch.as_tensor(drawn), expected).pvalue > 1e-3
    assert expected.tolist() == pytest.approx(
        (sampler.expected_repeats(progress) * torch.tensor(COUNTS) * 30).tolist()
    )


def test_natural_epoch_shows_every_image_once_in_a_new_order() -> None:
    sampler = Natural().build(TARGETS, seed=0)
    first, second = sampler.epoch(0.0), sampler.epoch(0.0)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(len(TARGETS)))
    assert first.tolist() != second.tolist()
    assert first.dtype == torch.int64


def test_images_repeat_only_after_the_whole_class_was_shown() -> None:
    sampler = ClassAware().build(TARGETS, seed=0)
    shown = torch.cat([sampler.epoch(0.0) for _ in range(7)])
    for c, n in enumerate(COUNTS):
        images = shown[TARGETS[shown] == c]
        turns = [images[i : i + n].tolist() for i in range(0, len(images) - n + 1, n)]
        assert turns, "the test draws too little to see one full turn"
        whole = members(c).tolist()
        assert all(sorted(turn) == whole for turn in turns)
        assert n < 20 or len({tuple(turn) for turn in turns}) == len(turns)


def test_only_classes_are_drawn_at_random_so_no_number_of_images_is_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weighed: list[int] = []
    multinomial = torch.multinomial

    def watched(weights: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weighed.append(weights.numel())
        return multinomial(weights, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", watched)
    ClassAware().build(TARGETS, seed=0).epoch(0.0)
    assert weighed == [len(COUNTS)]


@pytest.mark.parametrize("component", ALL, ids=repr)
def test_resumed_sampler_continues_bit_for_bit(component: SamplerComponent) -> None:
    whole = component.build(TARGETS, seed=3, groups=GROUPS)
    resumed = component.build(TARGETS, seed=3, groups=GROUPS)
    for step in range(10):
        if step == 4:
            state = resumed.state_dict()
            resumed = component.build(TARGETS, seed=3, groups=GROUPS)
            resumed.load_state_dict(state)
        plan = whole.epoch(step / 10)
        assert torch.equal(plan, resumed.epoch(step / 10)), step
        whole.observe(plan, plan.float().sin())
        resumed.observe(plan, plan.float().sin())


def test_state_of_other_data_is_refused() -> None:
    other = ClassAware().build(targets_with((5, 4, 3)), seed=0).state_dict()
    with pytest.raises(CheckpointError, match="drawn"):
        ClassAware().build(TARGETS, seed=0).load_state_dict(other)


@pytest.mark.parametrize("component", ALL, ids=repr)
@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_of_all_ranks_are_the_plan_of_one(
    component: SamplerComponent, world_size: int
) -> None:
    alone = component.build(TARGETS, seed=2, groups=GROUPS)
    ranks = [
        component.build(TARGETS, seed=2, groups=GROUPS, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for progress in (0.0, 0.5, 0.9):
        plan, shards = alone.epoch(progress), [rank.epoch(progress) for rank in ranks]
        merged = torch.empty_like(plan)
        for rank, shard in enumerate(shards):
            merged[rank::world_size] = shard
        assert torch.equal(merged, plan)
    assert sum(len(rank) for rank in ranks) == len(alone)


def test_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        Natural().build(TARGETS, seed=0, rank=2, world_size=2)


@pytest.mark.parametrize("component", ALL, ids=repr)
def test_same_seed_same_epochs_and_other_seed_others(component: SamplerComponent) -> None:
    one, same, other = (component.build(TARGETS, seed=s, groups=GROUPS) for s in (5, 5, 6))
    torch.manual_seed(0)
    a = one.epoch(0.3)
    torch.manual_seed(1)
    assert torch.equal(a, same.epoch(0.3))
    assert not torch.equal(a, other.epoch(0.3))
    assert not torch.equal(a, one.epoch(0.3))


@pytest.mark.parametrize(
    "component",
    [
        ClassAware(start=0.8),
        EffectiveNumber(start=0.8),
    ],
    ids=repr,
)
def test_deferred_sampler_is_natural_before_its_start(component: SamplerComponent) -> None:
    sampler = component.build(TARGETS, seed=0)
    natural = sorted(range(len(TARGETS)))
    assert sorted(sampler.epoch(159 / 200).tolist()) == natural
    assert sorted(sampler.epoch(160 / 200).tolist()) != natural
    assert sampler.expected_repeats(0.0).tolist() == [1.0] * 4


@pytest.mark.parametrize("component", ALL, ids=repr)
def test_class_without_samples_is_never_drawn(component: SamplerComponent) -> None:
    sampler = component.build(
        targets_with((30, 0, 8)), seed=0, groups=Groups((0,), (1, 3), (2,)), num_classes=5
    )
    for progress in (0.0, 0.6, 1.0):
        p = sampler.class_probabilities(progress)
        assert p.shape == (5,)
        assert p[[1, 3, 4]].tolist() == [0, 0, 0]
        assert float(p.sum()) == pytest.approx(1)
        assert sampler.expected_repeats(progress)[[1, 3, 4]].tolist() == [0, 0, 0]
        sampler.epoch(progress)


def test_no_samples_is_an_error_of_the_data() -> None:
    with pytest.raises(DataError, match="no samples"):
        Natural().build(torch.empty(0, dtype=torch.int64), seed=0)


def test_sampler_serves_an_ordinary_data_loader() -> None:
    sampler = ClassAware(start=0.8).build(TARGETS, seed=0, rank=1, world_size=2)
    loader = DataLoader(TensorDataset(TARGETS), batch_size=32, sampler=sampler)
    drawn = torch.cat([batch for (batch,) in loader])
    assert len(drawn) == len(sampler) == len(TARGETS) // 2
    assert drawn.bincount()[3] > 20, "without set_progress the deferred part acts"
    sampler.set_progress(0.0)
    assert torch.cat([batch for (batch,) in loader]).bincount(minlength=4)[3] <= 5
