"""Intervals of every metric at once: closed forms where they hold, else a bootstrap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from tuner import metrics
from tuner.statistics._intervals import (
    Array,
    Interval,
    geometric_mean_interval,
    mean_recall_interval,
    normal_quantile,
    wilson,
    worst_class_interval,
)

if TYPE_CHECKING:
    from tuner.imbalance import Groups

_Reduce = Callable[[Array], Array]
_CHUNK = 4_000_000


def bootstrap_intervals(
    outputs: Tensor,
    targets: Tensor,
    groups: Groups,
    *,
    seed: int,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Interval | None]:
    """Interval of every metric of ``metrics.METRICS``; None where it cannot be had.

    ``outputs`` are logits (N, C), or predictions (N,), which give no interval to the metrics
    of probabilities. Accuracy has Wilson's interval (conservative, as the class sizes are
    fixed), the other metrics of recalls have the closed forms of this package.

    The rest is bootstrapped within the classes: n - 1 of n images, rescaled (Rao and Wu 1988),
    as plain resampling understates the variance of a class of n by 1/n. The interval reaches
    from the estimate and from the bias-corrected estimate 1.96 standard deviations (at 95 %)
    outwards: calibration errors are biased upwards, again in each resample, so that percentile
    intervals of a nearly calibrated model's ECE covered 0 to 5 % in simulations with 20 images
    per class. These cover 88 to 95 % there, and 93 to 97 % for nll and macro F1. The classwise
    ECE of so few images is mostly bias (coverage 8 %), so it has no interval.

    Raises:
        DataError: There are no images.
        NonFiniteError: A logit is NaN or infinite.
    """
    outputs, targets = outputs.detach().cpu(), targets.cpu()
    logits = outputs.to(torch.float64) if outputs.ndim == 2 else None
    metrics.refuse_unusable(outputs)
    predictions = outputs if logits is None else logits.argmax(1)
    num_classes = sum(map(len, groups.named().values()))
    confusion = metrics.confusion_matrix(predictions, targets, num_classes)
    intervals: dict[str, Interval | None] = dict.fromkeys(metrics.METRICS)
    intervals |= _recall_intervals(confusion, groups, confidence)
    rng = np.random.default_rng(seed)
    statistics = [_f1_statistic(predictions, targets, confusion)]
    statistics += [] if logits is None else _probability_statistics(logits, targets)
    bootstrapped = _bootstrap(statistics, targets, rng, resamples, confidence)
    names = ("macro_f1", "nll", "ece")
    return intervals | dict(zip(names, bootstrapped, strict=False))


def _recall_intervals(
    confusion: Tensor, groups: Groups, confidence: float
) -> dict[str, Interval | None]:
    hits, images = confusion.diagonal().double().numpy(), confusion.sum(1).double().numpy()
    intervals: dict[str, Interval | None] = {
        name: mean_recall_interval(
            hits,
            images,
            metrics.recall_weights(name, confusion.sum(1), groups).numpy(),
            confidence,
        )
        for name in metrics.RECALL_METRICS
    }
    intervals["accuracy"] = wilson(hits.sum(), images.sum(), confidence)
    intervals["worst_class"] = worst_class_interval(hits, images, confidence)
    intervals["geometric_mean"] = geometric_mean_interval(hits, images, confidence)
    return intervals


def _f1_statistic(predictions: Tensor, targets: Tensor, confusion: Tensor) -> tuple[Any, _Reduce]:
    """Columns (N, 2C) whose weighted sums are hits and predictions per class; F1 of the sums."""
    from scipy import sparse

    num_classes, rows = len(confusion), np.arange(len(targets))
    hits = (predictions == targets).double().numpy()
    columns, shape = predictions.numpy(), (len(rows), num_classes)
    predicted = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=shape)
    right = sparse.csr_array((hits, (rows, columns)), shape=shape)
    images = confusion.sum(1).double().numpy()
    present = images > 0

    def reduce(sums: Array) -> Array:
        right, predicted = sums[:, :num_classes][:, present], sums[:, num_classes:][:, present]
        mean: Array = (2 * right / (predicted + images[present])).mean(1)
        return mean

    return sparse.hstack([right, predicted], format="csr"), reduce


def _probability_statistics(logits: Tensor, targets: Tensor) -> list[tuple[Any, _Reduce]]:
    """Columns (N, 1) and (N, bins), and how nll and ece follow from their weighted sums."""
    losses = F.cross_entropy(logits, targets, reduction="none").numpy()[:, None]
    confidence, predictions = logits.softmax(1).max(1)
    images, bins = len(losses), metrics.confidence_bins(confidence)
    gaps = F.one_hot(bins, metrics.CALIBRATION_BINS).double()
    gaps *= (confidence - (predictions == targets).double())[:, None]
    return [
        (losses, lambda sums: sums[:, 0] / images),
        (gaps.numpy(), lambda sums: np.abs(sums).sum(1) / images),
    ]


def _bootstrap(
    statistics: list[tuple[Any, _Reduce]],
    targets: Tensor,
    rng: np.random.Generator,
    resamples: int,
    confidence: float,
) -> list[Interval]:
    ones = np.ones((1, len(targets)))
    estimates = [float(reduce(ones @ table)[0]) for table, reduce in statistics]
    draws = [
        [reduce(chunk @ table) for table, reduce in statistics]
        for chunk in _resampled_weights(targets.numpy(), rng, resamples)
    ]
    samples = [np.concatenate(parts) for parts in zip(*draws, strict=True)]
    z, tops = normal_quantile(confidence), (1.0, math.inf, 1.0)
    return [
        _bias_aware(estimate, sample, z, top)
        for estimate, sample, top in zip(estimates, samples, tops, strict=False)
    ]


def _bias_aware(estimate: float, sample: Array, z: float, top: float) -> Interval:
    corrected, half = 2 * estimate - float(sample.mean()), z * float(sample.std(ddof=1))
    low, high = min(estimate, corrected) - half, max(estimate, corrected) + half
    return Interval(max(low, 0.0), min(high, top))


def _resampled_weights(
    targets: NDArray[np.int64], rng: np.random.Generator, resamples: int
) -> Iterator[Array]:
    """Weights of the images in each resample, in chunks (r, N); a class's weights sum to n."""
    order = np.argsort(targets, kind="stable")
    sizes = np.bincount(targets)[targets[order]]
    starts = np.searchsorted(targets[order], targets[order])
    last = np.arange(len(order)) == starts + sizes - 1
    scale = np.where(sizes == 1, 1.0, np.where(last, 0.0, sizes / np.maximum(sizes - 1, 1)))
    for done in range(0, resamples, size := max(1, _CHUNK // len(order))):
        rows = min(size, resamples - done)
        drawn = order[starts + (rng.random((rows, len(order))) * sizes).astype(np.int64)]
        cells = (drawn + len(order) * np.arange(rows)[:, None]).ravel()
        weights: Any = np.bincount(cells, np.tile(scale, rows), minlength=rows * len(order))
        yield weights.reshape(rows, -1)
