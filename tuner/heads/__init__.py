"""The head rung's engine: classifiers of hundreds of recipes on features of one backbone."""

from __future__ import annotations

from tuner.heads._features import Features, cached_features
from tuner.heads._holding import holding
from tuner.heads._settings import COHORT, HeadTraining
from tuner.heads._train import HeadResult, train_heads

__all__ = [
    "COHORT",
    "Features",
    "HeadResult",
    "HeadTraining",
    "cached_features",
    "holding",
    "train_heads",
]
