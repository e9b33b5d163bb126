"""Two recipes trained several times, with other seeds and on other divisions of the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from tuner.statistics._intervals import Interval

ROUNDING = 1e-9
"""Differences of metrics that are equal are computed to be so but for less than this."""


@dataclass(frozen=True)
class RepeatedDifference:
    """Mean of paired differences, its 95 % interval, and the p-value of "not better"."""

    estimate: float
    interval: Interval
    p_value: float


def repeated_difference(
    differences: Sequence[float],
    ratio: float,
    *,
    maximize: bool = True,
    largest: float = math.inf,
    confidence: float = 0.95,
) -> RepeatedDifference:
    """Judge paired differences (r,), r ≥ 2, each from a training of its own.

    ``ratio`` is that of validation to training images. The trainings share most of their images,
    so that their mean varies more than independent ones would: the variance is
    (1/r + ratio) times that of the differences, the corrected resampled t-test of Nadeau and
    Bengio (2003). The p-value is one-sided, for a mean of at most zero; of at least zero where
    smaller values are better (``maximize`` is false). The interval ends at the ``largest``
    difference that there can be, either way. Equal differences, as few images give, have no
    variance: then it is the p-value of coins that fall alike, and the interval reaches to zero
    while so few coins do not exclude that.

    Raises:
        ValueError: There are fewer than two differences.
    """
    from scipy.stats import t

    count = len(differences)
    if count < 2:
        raise ValueError("it takes two trainings to see how much they vary")
    mean = fmean(differences)
    error = math.sqrt((1 / count + ratio) * variance(differences))
    gain = mean if maximize else -mean
    if error > ROUNDING:
        half = float(t.ppf((1 + confidence) / 2, count - 1)) * error
        p_value = float(t.sf(gain / error, count - 1))
    else:
        half = abs(mean) if 2 * 0.5**count > 1 - confidence else 0.0
        p_value = 0.5**count if gain > ROUNDING else 1.0
    interval = Interval(max(mean - half, -largest), min(mean + half, largest))
    return RepeatedDifference(mean, interval, p_value)
