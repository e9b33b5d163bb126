"""Trainings with several seeds: the corrected resampled t-test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tuner.statistics import repeated_difference


def test_without_shared_images_it_is_students_t_test() -> None:
    differences = [0.03, 0.01, 0.05, -0.01, 0.02]
    found = repeated_difference(differences, 0.0)
    expected = stats.ttest_1samp(differences, 0.0, alternative="greater")
    assert found.p_value == pytest.approx(expected.pvalue)
    both = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    assert (found.interval.low, found.interval.high) == pytest.approx((both.low, both.high))


def test_shared_training_images_widen_it_as_nadeau_and_bengio_say() -> None:
    differences = [0.03, 0.01, 0.05, -0.01]
    plain, corrected = (repeated_difference(differences, ratio) for ratio in (0.0, 0.25))
    assert corrected.estimate == plain.estimate == pytest.approx(0.02)
    widths = [f.interval.high - f.interval.low for f in (plain, corrected)]
    assert widths[1] / widths[0] == pytest.approx(((1 / 4 + 0.25) / (1 / 4)) ** 0.5)
    assert corrected.p_value > plain.p_value


def test_equal_differences_are_not_taken_for_certainty() -> None:
    assert repeated_difference([0.1, 0.1], 0.2).p_value == 0.25
    assert repeated_difference([0.0, 0.0], 0.2).p_value == 1.0
    assert repeated_difference([-0.1, -0.1], 0.2).p_value == 1.0


def test_differences_that_are_equal_but_for_rounding_are_equal() -> None:
    differences = [0.7 - 0.6, 0.4 - 0.3]
    assert differences[0] != differences[1]
    assert repeated_difference(differences, 0.2).p_value == 0.25
    assert repeated_difference([-d for d in differences], 0.2, maximize=False).p_value == 0.25


def test_interval_of_few_equal_differences_holds_zero() -> None:
    for count, holds in ((2, True), (5, True), (6, False)):
        for value in (0.1, -0.1):
            interval = repeated_difference([value] * count, 0.2).interval
            assert (interval.low <= 0 <= interval.high) == holds
            assert interval.low - 1e-9 <= value <= interval.high + 1e-9


def test_two_seeds_on_few_images_seldom_tell_equal_recipes_apart() -> None:
    rng = np.random.default_rng(0)
    images = np.array([4, 3, 2])
    recalls = rng.binomial(images, 0.6, size=(2000, 2, 2, 3)) / images
    values = recalls.mean(-1)
    found = [repeated_difference((a - b).tolist(), 0.5).p_value for a, b in values]
    assert sum(p < 0.001 for p in found) / 2000 < 0.003


def test_one_training_says_nothing_of_how_much_they_vary() -> None:
    with pytest.raises(ValueError, match="two trainings"):
        repeated_difference([0.1], 0.2)


def test_false_alarms_stay_at_their_level_where_trainings_share_images() -> None:
    # Each repetition shares a common error with the others, as overlapping training parts do.
    rng = np.random.default_rng(0)
    alarms, ratio, count = 0, 0.25, 5
    shared = ratio / (1 + ratio)
    for _ in range(2000):
        common = rng.normal(scale=shared**0.5)
        own = rng.normal(scale=(1 - shared) ** 0.5, size=count)
        alarms += repeated_difference((common + own).tolist(), ratio).p_value < 0.05
    assert alarms / 2000 < 0.07


def test_the_interval_ends_at_the_largest_difference_there_can_be() -> None:
    found = repeated_difference([0.9, 0.1], 0.2, largest=1.0)
    assert (found.interval.low, found.interval.high) == (-1.0, 1.0)
    assert found.p_value == repeated_difference([0.9, 0.1], 0.2).p_value
