from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest
from torch import Tensor

from tuner import metrics, statistics
from tuner.errors import DataError, NonFiniteError
from tuner.imbalance import Groups
from tuner.statistics import Interval

GOLDEN: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "golden" / "metrics.json").read_text(encoding="utf-8")
)["binomial_intervals_95"]
GROUPS = Groups((0, 1, 2), (3, 4, 5), (6, 7, 8, 9))
Array = NDArray[np.float64]
torch.set_num_threads(1)


def setting(
    classes: int, images: tuple[int, int], recalls: tuple[float, float], seed: int = 0
) -> tuple[Array, Array, np.random.Generator]:
    """Class sizes and true recalls drawn from their ranges."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(images[0], images[1] + 1, classes).astype(np.float64)
    return sizes, rng.uniform(*recalls, classes), rng


def covered(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    return interval.low <= truth <= interval.high


def drawn(images: int, seed: int = 0, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(classes).repeat_interleave(images)
    logits = 1.5 * torch.randn(len(targets), classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(len(targets)), targets] += 1.5
    return logits, targets


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['k']} of {case['n']}")
def test_wilson_equals_the_published_numbers(case: dict[str, Any]) -> None:
    interval = statistics.wilson(case["k"], case["n"])
    assert [interval.low, interval.high] == pytest.approx(case["wilson"], abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 300), st.floats(0, 1), st.floats(0.5, 0.999))
def test_wilson_equals_scipy_at_every_confidence(n: int, share: float, confidence: float) -> None:
    k = round(share * n)
    expected = binomtest(k, n).proportion_ci(confidence, method="wilson")
    interval = statistics.wilson(k, n, confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert interval.low <= k / n <= interval.high


def test_wilson_knows_nothing_without_trials_and_refuses_odd_confidence() -> None:
    assert statistics.wilson(0, 0) == Interval(0.0, 1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.wilson(1, 2, confidence=95)


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0, 1))
def test_mean_recall_of_one_class_has_wilsons_interval(n: int, share: float) -> None:
    k = round(share * n)
    hits, images = np.array([k, 3.0]), np.array([n, 9.0])
    found = statistics.mean_recall_interval(hits, images, np.array([1.0, 0.0]))
    expected = statistics.wilson(k, n)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize("recall", [0.0, 1.0])
def test_mean_recall_never_collapses_at_zero_or_one(recall: float) -> None:
    images = np.full(10, 5.0)
    found = statistics.mean_recall_interval(recall * images, images, np.full(10, 0.1))
    expected = statistics.wilson(recall * 50, 50)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.high - found.low > 0.05


COVERAGE_SETTINGS = [
    (10, (5, 20), (0.3, 0.95)),
    (10, (5, 20), (0.9, 0.99)),
    (10, (1, 3), (0.3, 0.95)),
    (3, (5, 10), (0.05, 0.1)),
    (50, (5, 5), (0.95, 0.95)),
    (50, (2, 20), (0.3, 0.95)),
    (100, (2, 5), (0.02, 0.98)),
]


@pytest.mark.parametrize(("classes", "images", "recalls"), COVERAGE_SETTINGS)
def test_mean_recall_covers_the_truth_as_often_as_it_says(
    classes: int, images: tuple[int, int], recalls: tuple[float, float]
) -> None:
    sizes, truth, rng = setting(classes, images, recalls)
    weights = np.full(classes, 1 / classes)
    hits = rng.binomial(sizes.astype(int), truth, size=(2000, classes)).astype(np.float64)
    found = [
        covered(statistics.mean_recall_interval(h, sizes, weights), truth.mean()) for h in hits
    ]
    assert 0.92 <= np.mean(found) <= 0.98


@pytest.mark.parametrize(
    ("classes", "images", "recalls"),
    [(3, (5, 20), (0.3, 0.95)), (10, (20, 20), (0.7, 0.7)), (30, (5, 20), (0.3, 0.95))],
)
def test_worst_class_and_geometric_mean_cover_the_truth(
    classes: int, images: tuple[int, int], recalls: tuple[float, float]
) -> None:
    sizes, truth, rng = setting(classes, images, recalls)
    hits = rng.binomial(sizes.astype(int), truth, size=(1000, classes)).astype(np.float64)
    worst = [covered(statistics.worst_class_interval(h, sizes), truth.min()) for h in hits]
    mean = np.exp(np.log(truth).mean())
    geometric = [covered(statistics.geometric_mean_interval(h, sizes), mean) for h in hits]
    assert np.mean(worst) >= 0.92
    assert 0.92 <= np.mean(geometric) <= 0.99


def test_intervals_hold_their_estimates() -> None:
    for seed in range(20):
        logits, targets = drawn(3, seed)
        estimates = metrics.evaluate(logits, targets, GROUPS)
        intervals = statistics.bootstrap_intervals(logits, targets, GROUPS, seed=0, resamples=50)
        assert list(intervals) == list(metrics.METRICS)
        for name, interval in intervals.items():
            estimate = estimates[name]
            assert estimate is not None
            assert interval is not None
            assert interval.low - 1e-12 <= estimate <= interval.high + 1e-12, name
            assert interval.low >= 0
            assert interval.high > interval.low
            assert interval.high <= 1 or name == "nll"


def test_intervals_are_reproducible_and_follow_the_seed() -> None:
    logits, targets = drawn(5)
    first, again, other = (
        statistics.bootstrap_intervals(logits, targets, GROUPS, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first["nll"] != other["nll"]
    assert first["tail_accuracy"] == other["tail_accuracy"]


def test_intervals_narrow_with_images_and_widen_with_confidence() -> None:
    few, many = (
        statistics.bootstrap_intervals(*drawn(images), GROUPS, seed=0) for images in (5, 80)
    )
    sure = statistics.bootstrap_intervals(*drawn(5), GROUPS, seed=0, confidence=0.99)
    for name in metrics.METRICS:
        narrow, wide, wider = many[name], few[name], sure[name]
        assert narrow is not None
        assert wide is not None
        assert wider is not None
        assert narrow.high - narrow.low < wide.high - wide.low < wider.high - wider.low, name


def test_predictions_give_the_intervals_that_need_no_probabilities() -> None:
    logits, targets = drawn(8)
    from_logits = statistics.bootstrap_intervals(logits, targets, GROUPS, seed=0)
    from_predictions = statistics.bootstrap_intervals(logits.argmax(1), targets, GROUPS, seed=0)
    for name in metrics.METRICS:
        expected = None if name in ("nll", "ece", "classwise_ece") else from_logits[name]
        assert from_predictions[name] == expected


def test_groups_without_images_have_no_interval() -> None:
    logits, targets = drawn(5)
    kept = targets < 6
    intervals = statistics.bootstrap_intervals(logits[kept], targets[kept], GROUPS, seed=0)
    assert intervals["tail_accuracy"] is None
    assert intervals["balanced_accuracy"] is not None


def test_bootstrap_refuses_what_evaluate_refuses() -> None:
    logits, targets = drawn(2)
    with pytest.raises(DataError, match="no images"):
        statistics.bootstrap_intervals(logits[:0], targets[:0], GROUPS, seed=0)
    logits[3] = math.nan
    with pytest.raises(NonFiniteError):
        statistics.bootstrap_intervals(logits, targets, GROUPS, seed=0)


@pytest.mark.parametrize("scale", [0.667, 1.5], ids=["calibrated", "overconfident"])
def test_bootstrapped_metrics_cover_the_truth(scale: float) -> None:
    logits, targets = drawn(20_000)
    population = metrics.evaluate(scale * logits, targets, GROUPS)
    hits = dict.fromkeys(("macro_f1", "nll", "ece", "classwise_ece"), 0)
    for seed in range(100):
        logits, targets = drawn(12, seed + 1)
        intervals = statistics.bootstrap_intervals(
            scale * logits, targets, GROUPS, seed=seed, resamples=200
        )
        for name in hits:
            truth = population[name]
            assert truth is not None
            hits[name] += covered(intervals[name], truth)
    assert all(hits[name] >= 91 for name in hits), hits


def test_intervals_do_not_depend_on_what_was_resampled_before() -> None:
    logits, targets = drawn(40, 3)
    others = targets.flip(0)

    def found(targets: Tensor, seed: int) -> dict[str, statistics.Interval | None]:
        return statistics.bootstrap_intervals(logits, targets, GROUPS, seed=seed)

    first = found(targets, 0)
    assert found(others, 0) != first
    assert found(targets, 1) != first
    assert found(targets, 0) == first


def test_resamples_keep_class_sizes_and_have_the_right_variance() -> None:
    targets = np.repeat(np.arange(4), [1, 2, 5, 30])[::-1].copy()
    values = np.random.default_rng(0).normal(size=len(targets))
    chunks = statistics._bootstrap._resampled_weights(targets, 0, 20_000)
    weights = np.concatenate(list(chunks), axis=1).T
    assert weights.shape == (20_000, len(targets))
    for c, size in enumerate([1, 2, 5, 30]):
        inside = targets == c
        np.testing.assert_allclose(weights[:, inside].sum(1), size)
        if size > 1:
            means = weights[:, inside] @ values[inside] / size
            unbiased = values[inside].var(ddof=1) / size
            assert means.var() == pytest.approx(unbiased, rel=0.05)
