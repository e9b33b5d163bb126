"""Augmentation of single images against brute force, by hand and pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from augment_cases import (
    MEAN,
    STD,
    build,
    plain_standard,
    random_images,
)

from tuner.augment import (
    AUGMENTS,
    NoAugment,
    Standard,
    cut_out,
    mirror,
    shift,
)
from tuner.augment._transforms import whole
from tuner.imbalance import Groups
from tuner.seeding import generator

EVERYTHING = Standard(cutout=3, brightness=0.2, mixup=0.5, cutmix=1.0, remix=True, tail_strength=2)


def shifted_by_hand(image: np.ndarray[Any, Any], down: int, right: int) -> np.ndarray[Any, Any]:
    result = np.zeros_like(image)
    channels, height, width = image.shape
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                if 0 <= y - down < height and 0 <= x - right < width:
                    result[c, y, x] = image[c, y - down, x - right]
    return result


def test_images_are_normalised_with_mean_and_spread_of_the_data() -> None:
    images = random_images(5)
    expected = (images.double() / 255 - torch.tensor(MEAN).double().view(1, 3, 1, 1)) / (
        torch.tensor(STD).double().view(1, 3, 1, 1)
    )
    augmenter = build(NoAugment())
    result, targets = augmenter(images, torch.arange(4), generator(0), 0.5)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(augmenter.normalize(images), result)
    assert torch.equal(targets, torch.arange(4))


def test_mean_and_spread_may_be_plain_numbers() -> None:
    images = random_images(2)
    expected = build(NoAugment()).normalize(images)
    given_as_tuples = build(NoAugment(), mean=MEAN, std=STD)
    torch.testing.assert_close(given_as_tuples.normalize(images), expected)


def test_channel_without_spread_stays_finite() -> None:
    augmenter = build(NoAugment(), (1, 4, 4), mean=(1.0,), std=(0.0,))
    assert torch.equal(augmenter.normalize(torch.full((2, 1, 4, 4), 255)), torch.zeros(2, 1, 4, 4))


def test_normalising_leaves_the_given_images_alone() -> None:
    images = random_images(2).float()
    before = images.clone()
    build(NoAugment()).normalize(images)
    assert torch.equal(images, before)


def test_shift_matches_moving_each_pixel_by_hand() -> None:
    images = random_images(6, (2, 5, 8))
    down, right = torch.tensor([0, 3, -3, 1, -2, 0]), torch.tensor([0, -3, 3, 2, -1, 1])
    result = shift(images, down, right, 3)
    for image, moved, y, x in zip(images, result, down, right, strict=True):
        assert np.array_equal(moved.numpy(), shifted_by_hand(image.numpy(), int(y), int(x)))


def test_mirror_flips_exactly_the_chosen_images() -> None:
    images = random_images(4, (2, 3, 5))
    result = mirror(images, torch.tensor([True, False, False, True]))
    expected = [images[0].flip(2), images[1], images[2], images[3].flip(2)]
    assert torch.equal(result, torch.stack(expected))


@pytest.mark.parametrize("size", [(3, 6, 6), (1, 5, 8)])
def test_crop_and_flip_give_every_shift_of_every_image_equally_often(
    size: tuple[int, int, int],
) -> None:
    """Each output must be one of the 2·(2p+1)² versions of its input, made by hand."""
    image = random_images(1, size)
    padding, number = 1, 1800
    augmenter = build(Standard(crop_padding=padding), size)
    result, _ = augmenter(
        image.expand(number, -1, -1, -1), torch.zeros(number).long(), generator(3), 0.0
    )
    versions = [
        shifted_by_hand(image[0].numpy(), y, x)[:, :, ::direction].copy()
        for direction in (1, -1)
        for y in range(-padding, padding + 1)
        for x in range(-padding, padding + 1)
    ]
    candidates = augmenter.normalize(torch.from_numpy(np.stack(versions)))
    matches = (result[:, None] == candidates[None]).flatten(2).all(2)
    assert matches.sum(1).eq(1).all()
    assert matches.sum(0).min() > 60
    assert matches.sum(0).max() < 145


def test_without_flip_no_image_is_mirrored() -> None:
    images = random_images(50)
    augmenter = build(plain_standard())
    result, _ = augmenter(images, torch.zeros(50).long(), generator(0), 0.0)
    assert torch.equal(result, augmenter.normalize(images))


@pytest.mark.parametrize("side", [1, 2, 5])
def test_cutout_clears_one_clipped_square_around_a_random_pixel(side: int) -> None:
    images = torch.full((3000, 1, 7, 9), 255, dtype=torch.uint8)
    augmenter = build(plain_standard(cutout=side), (1, 7, 9))
    result, _ = augmenter(images, torch.zeros(3000).long(), generator(1), 0.0)
    holes = result[:, 0] == 0
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), heights * widths)
    assert int(heights.max()) == side
    assert int(widths.max()) == side
    assert int(heights.min()) == max(1, side - side // 2)
    assert holes.any(0).all()


def test_cutout_matches_clearing_pixels_by_hand() -> None:
    images = torch.ones(3, 1, 6, 6)
    row, column, sides = torch.tensor([0, 3, 5]), torch.tensor([2, 3, 5]), torch.tensor([4, 3, 0])
    result = cut_out(images, row, column, sides)
    for i in range(3):
        for y in range(6):
            for x in range(6):
                top, left, side = (
                    int(row[i]) - int(sides[i]) // 2,
                    int(column[i]) - int(sides[i]) // 2,
                    int(sides[i]),
                )
                inside = top <= y < top + side and left <= x < left + side
                assert float(result[i, 0, y, x]) == float(not inside)


def test_brightness_scales_whole_images_within_its_bounds() -> None:
    images = torch.full((2000, 1, 2, 2), 100, dtype=torch.uint8)
    augmenter = build(plain_standard(brightness=0.3), (1, 2, 2), mean=(0.0,), std=(1.0,))
    result, _ = augmenter(images, torch.zeros(2000).long(), generator(1), 0.0)
    factors = result[:, 0, 0, 0] * 255 / 100
    assert (result == result[:, :, :1, :1]).all()
    assert 0.7 <= float(factors.min()) < 0.71
    assert 1.29 < float(factors.max()) <= 1.3001


def test_brightness_never_exceeds_white() -> None:
    images = torch.full((500, 1, 2, 2), 250, dtype=torch.uint8)
    augmenter = build(plain_standard(brightness=0.5), (1, 2, 2), mean=(0.0,), std=(1.0,))
    result, _ = augmenter(images, torch.zeros(500).long(), generator(1), 0.0)
    assert float(result.max()) == pytest.approx(1.0)


def test_whole_numbers_stay_below_their_size_for_the_largest_draw() -> None:
    sizes = torch.arange(1, 5000)
    assert torch.equal(whole(torch.tensor(1 - 2**-24), sizes), sizes - 1)


def test_same_generator_state_gives_the_same_batch() -> None:
    images, targets = random_images(9), torch.arange(9) % 4
    augmenter = build(EVERYTHING)
    first, again, other = (augmenter(images, targets, generator(s), 0.1) for s in (1, 1, 2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_batches_of_one_generator_differ() -> None:
    images, targets, draws = random_images(9), torch.arange(9) % 4, generator(1)
    augmenter = build(EVERYTHING)
    assert not torch.equal(
        augmenter(images, targets, draws, 0.0)[0], augmenter(images, targets, draws, 0.0)[0]
    )


def test_global_random_state_is_neither_read_nor_moved() -> None:
    images, targets = random_images(9), torch.arange(9) % 4
    augmenter = build(EVERYTHING)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = augmenter(images, targets, generator(1), 0.0)[0]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(augmenter(images, targets, generator(1), 0.0)[0], first)


def test_images_given_are_not_changed() -> None:
    images = random_images(9)
    before = images.clone()
    build(EVERYTHING)(images, torch.arange(9) % 4, generator(1), 0.0)
    assert torch.equal(images, before)


def shift_range(component: Standard, label: int) -> int:
    """Largest downward shift seen, from images whose top row alone is bright."""
    images = torch.zeros(4000, 1, 20, 20, dtype=torch.uint8)
    images[:, :, 0] = 255
    augmenter = build(component, (1, 20, 20), mean=(0.0,), std=(1.0,))
    result, _ = augmenter(images, torch.full((4000,), label), generator(0), 0.0)
    return int(result[:, 0].amax(2).argmax(1).max())


def test_tail_images_are_shifted_further() -> None:
    component = Standard(crop_padding=2, flip=False, tail_strength=2.5)
    assert [shift_range(component, label) for label in range(4)] == [2, 2, 2, 5]


def test_tail_shift_is_held_at_half_the_image() -> None:
    assert shift_range(Standard(crop_padding=4, flip=False, tail_strength=9), 3) == 10


def test_tail_is_never_shifted_less_than_the_rest() -> None:
    component = Standard(crop_padding=12, flip=False, tail_strength=2)
    assert [shift_range(component, label) for label in (0, 3)] == [12, 12]


def test_tail_images_lose_larger_squares_and_vary_more_in_brightness() -> None:
    images = torch.full((4000, 1, 20, 20), 100, dtype=torch.uint8)
    component = plain_standard(cutout=4, brightness=0.2, tail_strength=2)
    augmenter = build(component, (1, 20, 20), mean=(0.0,), std=(1.0,))
    areas, spreads = [], []
    for label in (0, 3):
        result, _ = augmenter(images, torch.full((4000,), label), generator(0), 0.0)
        areas.append(int((result == 0).sum((1, 2, 3)).max()))
        spreads.append(float(result.amax((1, 2, 3)).max()) * 255 / 100 - 1)
    assert areas == [16, 64]
    assert spreads == pytest.approx([0.2, 0.4], abs=0.01)


def test_strength_one_treats_every_class_alike() -> None:
    images, draws = random_images(6), [generator(0), generator(0)]
    augmenter = build(Standard(cutout=3))
    head = augmenter(images, torch.zeros(6).long(), draws[0], 0.0)[0]
    tail = augmenter(images, torch.full((6,), 3), draws[1], 0.0)[0]
    assert torch.equal(head, tail)


def test_empty_tail_is_no_trouble() -> None:
    groups = Groups(head=(0, 1, 2, 3), medium=(), tail=())
    augmenter = build(Standard(tail_strength=3), groups=groups)
    assert augmenter(random_images(2), torch.tensor([0, 1]), generator(0), 0.0)[0].shape[0] == 2


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        (plain_standard(), NoAugment()),
        (plain_standard(remix=True, mix_until=0.5, tail_strength=4), NoAugment()),
        (plain_standard(mixup=1.0, cutmix=1.0, mix_until=0), NoAugment()),
        (Standard(remix=True, mix_until=0.5), Standard()),
        (plain_standard(flip=True, tail_strength=2), plain_standard(flip=True)),
        (Standard(mixup=0.2, remix=True), Standard(mixup=0.2, remix=True)),
        (Standard(tail_strength=2), Standard(tail_strength=2)),
        (NoAugment(), NoAugment()),
    ],
)
def test_canonical_form_drops_what_has_no_effect(component: Any, expected: Any) -> None:
    assert component.canonical() == expected


@pytest.mark.parametrize("name", list(AUGMENTS))
def test_every_augmentation_keeps_shape_and_gives_finite_floats(name: str) -> None:
    for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 20, 32)):
        augmenter = build(AUGMENTS[name](), shape)
        images, targets = augmenter(random_images(5, shape), torch.arange(5) % 4, generator(0), 0.0)
        assert images.shape == (5, *shape)
        assert images.dtype == torch.float32
        assert images.isfinite().all()
        assert len(targets) == 5


def test_augmenter_has_nothing_to_store_in_a_checkpoint() -> None:
    assert build(EVERYTHING).state_dict() == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_as_the_cpu() -> None:
    images, targets = random_images(64), torch.arange(64) % 4
    augmenter = build(EVERYTHING)
    expected = [augmenter(images, targets, generator(seed), 0.0) for seed in range(6)]
    for seed, (pixels, soft) in enumerate(expected):
        result = augmenter(images.cuda(), targets.cuda(), generator(seed), 0.0)
        torch.testing.assert_close(result[0].cpu(), pixels, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result[1].cpu(), soft)
