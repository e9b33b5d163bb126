from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tuner import metrics, statistics
from tuner.errors import UnknownNameError
from tuner.imbalance import Groups

GROUPS = Groups((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))
torch.set_num_threads(1)


def pair(
    seed: int, gain: float = 0.0, classes: int = 10, images: tuple[int, int] = (5, 20)
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of two models that disagree on a fifth of the images, and the targets."""
    sizes = np.random.default_rng(0).integers(images[0], images[1] + 1, classes)
    rng = np.random.default_rng(seed)
    targets = torch.arange(classes).repeat_interleave(torch.tensor(sizes))
    wrong = (targets + 1) % classes
    right = torch.tensor(rng.random(len(targets)) < 0.7)
    discordant = torch.tensor(rng.random(len(targets)) < 0.2)
    a_wins = torch.tensor(rng.random(len(targets)) < 0.5 + gain)
    a = torch.where(torch.where(discordant, a_wins, right), targets, wrong)
    return a, torch.where(torch.where(discordant, ~a_wins, right), targets, wrong), targets


@pytest.mark.parametrize("metric", metrics.RECALL_METRICS)
def test_paired_difference_is_the_difference_of_the_metrics(metric: str) -> None:
    a, b, targets = pair(0, gain=0.2)
    found = statistics.paired_difference(a, b, targets, GROUPS, metric, seed=0)
    scores = [
        metrics.evaluate(torch.eye(10)[predictions], targets, GROUPS)[metric]
        for predictions in (a, b)
    ]
    assert found is not None
    assert None not in scores
    assert found.estimate == pytest.approx(scores[0] - scores[1])  # type: ignore[operator]
    assert found.interval.low <= found.estimate <= found.interval.high
    swapped = statistics.paired_difference(b, a, targets, GROUPS, metric, seed=0)
    assert swapped is not None
    assert swapped.estimate == pytest.approx(-found.estimate)
    assert swapped.interval.low == pytest.approx(-found.interval.high)
    assert swapped.p_value == pytest.approx(found.p_value, abs=0.02)


@pytest.mark.parametrize("gain", [0.0, 0.25])
def test_paired_interval_covers_and_paired_test_keeps_its_size(gain: float) -> None:
    found = [
        statistics.paired_difference(*pair(seed, gain), GROUPS, seed=seed, resamples=399)
        for seed in range(400)
    ]
    truth = 0.2 * 2 * gain
    coverage = np.mean([f.interval.low <= truth <= f.interval.high for f in found if f is not None])
    rejected = np.mean([f.p_value <= 0.05 for f in found if f is not None])
    assert 0.92 <= coverage <= 0.985
    assert rejected <= 0.075 if gain == 0 else rejected > 0.5


def test_paired_test_of_accuracy_is_mcnemars_exact_test() -> None:
    for seed in range(5):
        a, b, targets = pair(seed, gain=0.15)
        found = statistics.paired_difference(
            a, b, targets, GROUPS, "accuracy", seed=0, resamples=20_000
        )
        assert found is not None
        assert found.p_value == pytest.approx(statistics.mcnemar(a, b, targets), abs=0.015)


def test_paired_interval_of_one_class_is_that_of_bonett_and_price() -> None:
    """Of 48 images a alone is right on 26 and b alone on 4; limits by R's statpsych."""
    targets = torch.zeros(48, dtype=torch.int64)
    a = torch.tensor([0] * 26 + [1] * 4 + [0] * 12 + [1] * 6)
    b = torch.tensor([1] * 26 + [0] * 4 + [0] * 12 + [1] * 6)
    found = statistics.paired_difference(a, b, targets, Groups((0,), (), (1,)), seed=0)
    assert found is not None
    assert found.estimate == pytest.approx(22 / 48)
    limits = (found.interval.low, found.interval.high)
    assert limits == pytest.approx((0.2548067, 0.6251933), abs=5e-4)


def test_equal_models_differ_by_nothing_but_not_for_certain() -> None:
    a, _, targets = pair(0)
    found = statistics.paired_difference(a, a, targets, GROUPS, seed=0)
    assert found is not None
    assert (found.estimate, found.p_value) == (0.0, 1.0)
    assert found.interval.low == pytest.approx(-found.interval.high)
    assert 0 < found.interval.high < 0.1
    assert statistics.mcnemar(a, a, targets) == 1.0


def test_paired_difference_is_none_without_images_and_refuses_other_metrics() -> None:
    a, b, targets = pair(0)
    kept = targets < 6
    arguments = a[kept], b[kept], targets[kept], GROUPS
    assert statistics.paired_difference(*arguments, "tail_accuracy", seed=0) is None
    with pytest.raises(UnknownNameError, match="macro_f1"):
        statistics.paired_difference(*arguments, "macro_f1", seed=0)


def test_mcnemar_counts_only_discordant_images() -> None:
    targets = torch.zeros(12, dtype=torch.int64)
    a = torch.tensor([0] * 8 + [1] * 4)
    b = torch.tensor([0] * 2 + [1] * 6 + [0] + [1] * 3)
    assert statistics.mcnemar(a, b, targets) == pytest.approx(2 * (1 + 7) / 2**7)


def test_holm_equals_the_worked_example_and_keeps_the_order() -> None:
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    assert statistics.holm([]) == []


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float]) -> None:
    adjusted = statistics.holm(p_values)
    alive = True
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        alive = alive and (len(p_values) - rank) * p_values[index] <= 0.05
        assert (adjusted[index] <= 0.05) == alive
        assert adjusted[index] >= p_values[index]
