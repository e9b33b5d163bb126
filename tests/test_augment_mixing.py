"""Mixup, cutmix and remix against their definitions, golden numbers and closed forms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from augment_cases import (
    build,
    distinct_images,
    plain_standard,
)

from tuner.augment import (
    Standard,
    beta,
    box_share,
    remix_weight,
)
from tuner.seeding import generator

GOLDEN = json.loads((Path(__file__).parent / "golden" / "augment.json").read_text())


def mix(component: Standard, number: int, seed: int, progress: float = 0.0) -> tuple[Any, ...]:
    """Mix images that are each a class of their own, so that targets tell who was mixed."""
    images = distinct_images(number)
    augmenter = build(component, (1, 12, 12), class_counts=torch.full((number,), 10))
    mixed, soft = augmenter(images, torch.arange(number), generator(seed), progress)
    return augmenter.normalize(images), mixed, soft


@pytest.mark.parametrize("seed", range(5))
def test_mixup_mixes_images_and_targets_by_the_same_share(seed: int) -> None:
    images, mixed, soft = mix(plain_standard(mixup=1.0), 16, seed)
    assert soft.dtype == torch.float32
    torch.testing.assert_close(soft.sum(1), torch.ones(16))
    torch.testing.assert_close(mixed, torch.einsum("ij,jchw->ichw", soft, images))
    assert int((soft > 0).sum(1).eq(2).sum()) > 10


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_area_equals_the_share_in_the_targets(seed: int) -> None:
    images, mixed, soft = mix(plain_standard(cutmix=1.0), 16, seed)
    own = (mixed == images).float().mean((1, 2, 3))
    torch.testing.assert_close(own, soft.diagonal())
    torch.testing.assert_close(
        mixed.mean((1, 2, 3)), soft @ images.mean((1, 2, 3)), rtol=1e-4, atol=1e-5
    )
    values = set(images[:, 0, 0, 0].tolist())
    assert set(mixed.unique().tolist()) <= values


def test_box_is_a_rectangle_with_about_the_wanted_area() -> None:
    draws = generator(0)
    for share in (0.1, 0.4, 0.75):
        maps = torch.stack([box_share(share, (20, 30), draws) for _ in range(200)])
        holes = maps == 0
        assert torch.equal(holes.sum((1, 2)), holes.any(2).sum(1) * holes.any(1).sum(1))
        # A box that is not clipped has the wanted area, up to the rounding of its sides.
        assert float(maps.mean((1, 2)).min()) == pytest.approx(share, abs=0.03)


def test_with_mixup_and_cutmix_each_batch_takes_one_of_them_equally_often() -> None:
    boxes = 0
    for seed in range(200):
        images, mixed, soft = mix(plain_standard(mixup=1.0, cutmix=1.0), 4, seed)
        changed = (mixed != images).any() and (soft.diagonal() < 1).any()
        boxes += bool(changed and set(mixed.unique().tolist()) <= set(images.unique().tolist()))
    assert 60 < boxes < 120


@pytest.mark.parametrize("case", GOLDEN["remix_lambda"]["results"], ids=str)
def test_remix_weight_matches_the_reference_code(case: dict[str, float]) -> None:
    weight = remix_weight(
        torch.tensor([case["lam_x"]], dtype=torch.float64),
        torch.tensor([case["n_i"]]),
        torch.tensor([case["n_j"]]),
    )
    assert float(weight) == pytest.approx(case["lam_y"], abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_remix_moves_targets_to_the_rarer_class_of_each_pair(seed: int) -> None:
    """Against the definition pair by pair; counts are 1000, 300, 100, 10 (ratio 3 included)."""
    images, targets = distinct_images(4, 4), torch.arange(4)
    plain, remixed = (
        build(plain_standard(mixup=1.0, remix=remix), (1, 4, 4))(
            images, targets, generator(seed), 0.0
        )[1]
        for remix in (False, True)
    )
    for own in range(4):
        share = float(plain[own, own])
        partner = int((plain[own] * (targets != own)).argmax())
        weight = share
        if partner > own and share < 0.5:
            weight = 0.0
        if partner < own and 1 - share < 0.5:
            weight = 1.0
        assert float(remixed[own, own]) == pytest.approx(weight)
        assert float(remixed[own].sum()) == pytest.approx(1)


def test_nothing_is_mixed_from_mix_until_on() -> None:
    component = plain_standard(mixup=1.0, cutmix=1.0, mix_until=0.8)
    for progress in (0.8, 0.9, 1.0):
        images, mixed, targets = mix(component, 8, 0, progress)
        assert torch.equal(mixed, images)
        assert torch.equal(targets, torch.arange(8))
    assert mix(component, 8, 0, 0.79)[2].shape == (8, 8)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_beta_draws_have_the_mean_and_variance_of_beta(alpha: float) -> None:
    draws = generator("beta", alpha)
    sample = np.array([beta(alpha, draws) for _ in range(4000)])
    assert sample.mean() == pytest.approx(0.5, abs=0.03)
    assert sample.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_beta_with_tiny_alpha_is_nearly_a_coin() -> None:
    draws = generator(0)
    sample = [beta(1e-3, draws) for _ in range(500)]
    assert all(min(x, 1 - x) < 0.01 for x in sample[:20])
    assert 0.4 < sum(sample) / 500 < 0.6
