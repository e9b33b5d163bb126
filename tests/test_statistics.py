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
from tuner.errors import DataError, NonFiniteError, UnknownNameError
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
        assert intervals.pop("classwise_ece") is None
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
    for name in metrics.METRICS.keys() - {"classwise_ece"}:
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
        expected = None if name in ("nll", "ece") else from_logits[name]
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


def test_bootstrapped_metrics_cover_the_truth() -> None:
    population = metrics.evaluate(*drawn(20_000), GROUPS)
    hits = dict.fromkeys(("macro_f1", "nll", "ece"), 0)
    for seed in range(100):
        intervals = statistics.bootstrap_intervals(
            *drawn(12, seed + 1), GROUPS, seed=seed, resamples=200
        )
        for name in hits:
            truth = population[name]
            assert truth is not None
            hits[name] += covered(intervals[name], truth)
    assert all(hits[name] >= 88 for name in hits), hits


def test_resamples_keep_class_sizes_and_have_the_right_variance() -> None:
    targets = np.repeat(np.arange(4), [1, 2, 5, 30])[::-1].copy()
    values = np.random.default_rng(0).normal(size=len(targets))
    chunks = statistics._bootstrap._resampled_weights(targets, np.random.default_rng(0), 20_000)
    weights = np.concatenate(list(chunks))
    assert weights.shape == (20_000, len(targets))
    for c, size in enumerate([1, 2, 5, 30]):
        inside = targets == c
        np.testing.assert_allclose(weights[:, inside].sum(1), size)
        if size > 1:
            means = weights[:, inside] @ values[inside] / size
            unbiased = values[inside].var(ddof=1) / size
            assert means.var() == pytest.approx(unbiased, rel=0.05)


def pair(
    seed: int, gain: float = 0.0, classes: int = 10, images: tuple[int, int] = (5, 20)
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of two models that disagree on a fifth of the images, and the targets."""
    sizes, _, _ = setting(classes, images, (0, 1))
    rng = np.random.default_rng(seed)
    targets = torch.arange(classes).repeat_interleave(torch.tensor(sizes.astype(int)))
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
    assert covered(found.interval, found.estimate)
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
    coverage = np.mean([covered(f.interval, truth) for f in found if f is not None])
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
