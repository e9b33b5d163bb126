"""Rank correlation with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tuner.statistics._intervals import Array, Interval, normal_quantile


def rank_correlation(
    pairs: Sequence[tuple[float, float]], confidence: float = 0.95
) -> tuple[float, Interval] | None:
    """Spearman's correlation of pairs, and its interval; None where it is not defined.

    Ties have their mean rank. The interval is Fisher's z with the variance of Bonett & Wright
    (2000), (1 + r²/2) / (n - 3), which covers better than 1 / (n - 3) for high correlations.
    """
    if len(pairs) < 4:
        return None
    ranks = [_ranks([pair[side] for pair in pairs]) for side in (0, 1)]
    if any(np.ptp(side) == 0 for side in ranks):
        return None
    count = len(pairs)
    found = float(np.corrcoef(ranks[0], ranks[1])[0, 1])
    # Half of what two neighbours that change places cost: where all ranks agree, z is finite.
    most = 1 - 6 / (count * (count**2 - 1))
    z = math.atanh(max(-most, min(most, found)))
    half = normal_quantile(confidence) * math.sqrt((1 + found**2 / 2) / (count - 3))
    return max(-1.0, min(1.0, found)), Interval(math.tanh(z - half), math.tanh(z + half))


def _ranks(values: Sequence[float]) -> Array:
    """Ranks from 1; ties have their mean. A worker need not load all of scipy's for this."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]
