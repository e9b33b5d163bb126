"""Intervals and paired tests for the metrics of one evaluation part.

The class sizes of the part are fixed; what is random is which images of a class are in it.
Textbook intervals fail here, where classes have 2 to 20 images: each method below was chosen
by its simulated coverage, and the tests repeat the simulation.
"""

from __future__ import annotations

from tuner.statistics._bootstrap import bootstrap_intervals, bootstrap_intervals_of_each
from tuner.statistics._intervals import (
    Interval,
    geometric_mean_interval,
    mean_recall_interval,
    wilson,
    worst_class_interval,
)
from tuner.statistics._paired import PairedDifference, holm, mcnemar, paired_difference
from tuner.statistics._ranks import rank_correlation
from tuner.statistics._repeated import RepeatedDifference, repeated_difference

__all__ = [
    "Interval",
    "PairedDifference",
    "RepeatedDifference",
    "bootstrap_intervals",
    "bootstrap_intervals_of_each",
    "geometric_mean_interval",
    "holm",
    "mcnemar",
    "mean_recall_interval",
    "paired_difference",
    "rank_correlation",
    "repeated_difference",
    "wilson",
    "worst_class_interval",
]
