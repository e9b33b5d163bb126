"""Search algorithms by name; the only module that imports ``optuna.samplers``."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.samplers._tpe.sampler import _split_trials, default_gamma
from optuna.search_space.group_decomposed import (
    _GroupDecomposedSearchSpace,
    _SearchSpaceGroup,
)
from optuna.trial import FrozenTrial, TrialState

STARTUP_TRIALS = 10

Sampler = TypeVar("Sampler", bound=TPESampler)


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
        ended = (TrialState.COMPLETE, TrialState.PRUNED)
        if use_cache and study._thread_local.cached_all_trials is None:
            # Optuna would read all trials: nothing is learnt from the hundreds that wait.
            study._thread_local.cached_all_trials = study.get_trials(deepcopy=False, states=ended)
        trials = study._get_trials(deepcopy=False, states=ended, use_cache=use_cache)
        distinct: dict[tuple[str, ...], dict[str, BaseDistribution]] = {}
        for trial in trials:
            distinct.setdefault(tuple(trial.distributions), trial.distributions)
        for distributions in distinct.values():
            self._search_space.add_distributions(distributions)
        return copy.deepcopy(self._search_space)


class CohortTPESampler(TPESampler):
    """TPE for many proposals that learn from the same trials.

    Its models are made once; and of the groups of hyperparameters only those are drawn that the
    drawn components have. Optuna makes the models anew for every proposal, and draws the
    hyperparameters of all components.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._models: dict[tuple[str, ...], tuple[Any, Any]] = {}
        self._space: dict[str, BaseDistribution] | None = None

    def seed(self, seed: int) -> None:
        """Draw from here on as a new sampler with this seed would."""
        self._rng.rng.seed(seed)
        self._random_sampler._rng.rng.seed(seed)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All hyperparameters that trials had so far."""
        if self._space is None:
            self._space = super().infer_relative_search_space(study, trial)
        return self._space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """A value for every hyperparameter that the chosen components have."""
        group = self._search_space_group
        spaces = [] if group is None else [dict(sorted(s.items())) for s in group.search_spaces]
        chosen = dict(trial.system_attrs.get("fixed_params", {}))
        # What chooses between components has no dot in its name.
        for space in sorted(spaces, key=lambda names: all("." in name for name in names)):
            open_ = {n: d for n, d in space.items() if n in search_space and _acts(n, chosen)}
            chosen = self._sample_relative(study, trial, open_) | chosen
        return chosen

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        key = tuple(search_space)
        if key not in self._models:
            states = (TrialState.COMPLETE, TrialState.PRUNED)
            trials = study._get_trials(deepcopy=False, states=states, use_cache=True)
            good, others = _split_trials(study, trials, default_gamma(len(trials)))
            self._models[key] = (
                self._build_parzen_estimator(study, search_space, good, handle_below=True),
                self._build_parzen_estimator(study, search_space, others, handle_below=False),
            )
        below, above = self._models[key]
        drawn = below.sample(self._rng.rng, self._n_ei_candidates)
        best = self._compare(drawn, self._compute_acquisition_func(drawn, below, above))
        return {name: kind.to_external_repr(best[name]) for name, kind in search_space.items()}


def _acts(name: str, chosen: dict[str, Any]) -> bool:
    """Whether a hyperparameter belongs to no component, or to a chosen one."""
    part, *rest = name.split(".")
    return not rest or chosen.get(part, rest[0]) == rest[0]


def cohort_tpe() -> CohortTPESampler:
    """The algorithm ``tpe`` for many proposals that learn from the same trials."""
    return _tpe(0, CohortTPESampler)


def algorithm(name: str, seed: int) -> BaseSampler:
    """The Optuna sampler behind an algorithm's name, seeded.

    ``tpe``: tree-structured Parzen estimator, one joint model for every group of
    hyperparameters that occur together, with Optuna 4's bandwidth. ``gp``: Gaussian
    process over what all trials share; hyperparameters of single branches are drawn at random.
    ``random`` draws uniformly; it also serves ``grid``, whose points come from the queue.
    """
    if name == "tpe":
        return _tpe(seed, TPESampler)
    if name == "gp":
        return GPSampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False
        )
    return RandomSampler(seed=seed)


def _tpe(seed: int, kind: type[Sampler]) -> Sampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = kind(seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP_TRIALS)
    sampler._parzen_estimator_cls = WideParzenEstimator
    sampler._group_decomposed_search_space = DistinctGroups(include_pruned=True)
    return sampler
