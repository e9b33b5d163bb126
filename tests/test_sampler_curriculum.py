"""The curriculum: easy images first, every image tried, the full set at its end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tuner.samplers import Curriculum

COUNTS = (200, 60, 20, 5)


def targets_with(counts: tuple[int, ...]) -> Tensor:
    targets = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    return targets[torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))]


TARGETS = targets_with(COUNTS)


def members(c: int) -> Tensor:
    return torch.argwhere(TARGETS.eq(c)).flatten()


def test_saved_state_does_not_change_with_the_sampler() -> None:
    sampler = Curriculum().build(TARGETS, seed=0)
    state = sampler.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    plan = sampler.epoch(0.0)
    sampler.observe(plan, torch.ones(len(plan)))
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_share_of_unseen_images_in_a_curriculum_is_what_an_epoch_misses() -> None:
    targets = targets_with((400, 150, 90))
    sampler = Curriculum(easy_fraction=0.4).build(targets, seed=0)
    seen = torch.bincount(sampler.epoch(0.1)).nonzero().flatten()
    missed = 1 - targets[seen].bincount() / targets.bincount()
    assert missed.tolist() == pytest.approx(sampler.unseen_share(0.1).tolist(), abs=0.06)


def test_curriculum_offers_the_easiest_images_of_every_class_first() -> None:
    sampler = Curriculum(until=0.5, easy_fraction=0.2).build(TARGETS, seed=0)
    losses = torch.rand(len(TARGETS), generator=torch.Generator().manual_seed(1))
    sampler.observe(torch.arange(len(TARGETS)), losses)
    plan = sampler.epoch(0.0)
    for c, n in enumerate(COUNTS):
        own = members(c)
        easiest = own[losses[own].argsort()][: -(-n // 5)]
        assert set(plan[TARGETS[plan] == c].tolist()) <= set(easiest.tolist())
    assert sampler.class_probabilities(0.0).tolist() == [0.25] * 4
    assert sorted(sampler.epoch(0.5).tolist()) == list(range(len(TARGETS)))


def test_curriculum_tries_every_image_before_it_ranks() -> None:
    sampler = Curriculum(until=1.0, easy_fraction=0.25).build(TARGETS, seed=0)
    seen: set[int] = set()
    for _ in range(8):
        plan = sampler.epoch(0.0)
        sampler.observe(plan, torch.ones(len(plan)))
        seen |= set(plan.tolist())
    assert seen == set(range(len(TARGETS)))


def test_curriculum_keeps_the_latest_loss_of_an_image_drawn_twice() -> None:
    sampler = Curriculum().build(TARGETS, seed=0)
    sampler.observe(torch.tensor([3, 3]), torch.tensor([1.0, 2.0]))
    assert sampler.state_dict()["losses"][3] == 2.0


def test_curriculum_shows_its_images_in_a_new_order_every_epoch() -> None:
    sampler = Curriculum().build(TARGETS, seed=0)
    sampler.observe(torch.arange(len(TARGETS)), torch.arange(len(TARGETS)).float())
    plans = [sampler.epoch(0.0) for _ in range(2)]
    first, second = (plan[TARGETS[plan] == 0][:50].tolist() for plan in plans)
    assert first != second
