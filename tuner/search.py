"""Search algorithms by name; the only module that imports ``optuna.samplers``."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.search_space.group_decomposed import (
    _GroupDecomposedSearchSpace,
    _SearchSpaceGroup,
)

STARTUP_TRIALS = 10


class WideParzenEstimator(_ParzenEstimator):
    """Parzen estimator with the bandwidth that Optuna 4 used for its multivariate TPE.

    Optuna 5 takes the distance to the neighbours instead, which is narrow while few trials are
    good: in conditional spaces it settles on one branch too early. The regression benchmark
    ``tests/benchmarks/algorithms.py`` measures the difference.
    """

    def _calculate_numerical_distributions(
        self, observations: Any, search_space: Any, parameters: Any
    ) -> Any:
        narrow: Any = super()._calculate_numerical_distributions(
            observations, search_space, parameters
        )
        count, dimensions = len(observations), len(self._search_space)
        width = narrow.adapted_high - narrow.adapted_low
        sigma = narrow.sigma.copy()
        scott = 0.2 * max(count, 1) ** (-1.0 / (dimensions + 4)) * width
        sigma[:-1] = np.clip(scott, width / min(100.0, 2.0 + count), width)
        return narrow._replace(sigma=sigma)


class DistinctGroups(_GroupDecomposedSearchSpace):
    """Optuna's groups of hyperparameters that occur together, found in less time.

    Trials with the same hyperparameters change nothing after the first of them; with thousands
    of trials, looking at each of them again takes a third of the time of a proposal.
    """

    def calculate(self, study: optuna.Study, use_cache: bool = False) -> _SearchSpaceGroup:
        """The groups of the trials so far."""
        ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
        trials = study._get_trials(deepcopy=False, states=ended, use_cache=use_cache)
        distinct: dict[tuple[str, ...], dict[str, BaseDistribution]] = {}
        for trial in trials:
            distinct.setdefault(tuple(trial.distributions), trial.distributions)
        for distributions in distinct.values():
            self._search_space.add_distributions(distributions)
        return copy.deepcopy(self._search_space)


def algorithm(name: str, seed: int) -> BaseSampler:
    """The Optuna sampler behind an algorithm's name, seeded.

    ``tpe``: tree-structured Parzen estimator, one joint model for every group of
    hyperparameters that occur together, with Optuna 4's bandwidth. ``gp``: Gaussian
    process over what all trials share; hyperparameters of single branches are drawn at random.
    ``random`` draws uniformly; it also serves ``grid``, whose points come from the queue.
    """
    if name == "tpe":
        return _tpe(seed)
    if name == "gp":
        return GPSampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False
        )
    return RandomSampler(seed=seed)


def _tpe(seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = TPESampler(
            seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP_TRIALS
        )
    sampler._parzen_estimator_cls = WideParzenEstimator
    sampler._group_decomposed_search_space = DistinctGroups(include_pruned=True)
    return sampler
