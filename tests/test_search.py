"""The search algorithms: ours is what it says, is repeatable, and finds more than chance."""

from __future__ import annotations

import runpy
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.samplers import GPSampler, RandomSampler, TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace
from optuna.trial import TrialState

from tuner.search import DistinctGroups, WideParzenEstimator, algorithm

BENCHMARK = Path(__file__).parent / "benchmarks" / "algorithms.py"
RANGES = {"x": FloatDistribution(-1.0, 3.0), "y": FloatDistribution(1e-3, 1e1, log=True)}


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    return runpy.run_path(str(BENCHMARK))


def sigmas(cls: type[Any], observed: dict[str, list[float]]) -> list[list[float]]:
    """Kernel widths per hyperparameter, each in units of its range; the prior's is last."""
    parameters = TPESampler(multivariate=True)._parzen_estimator_parameters
    values = {name: np.array(column) for name, column in observed.items()}
    mixture = cls(values, RANGES, parameters)._mixture_distribution
    return [(d.sigma / (d.adapted_high - d.adapted_low)).tolist() for d in mixture.distributions]


@pytest.mark.parametrize(
    ("name", "kind"), [("tpe", TPESampler), ("gp", GPSampler), ("random", RandomSampler)]
)
def test_algorithm_has_its_name(name: str, kind: type[Any]) -> None:
    assert isinstance(algorithm(name, seed=0), kind)


def test_algorithms_come_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    for name in ("tpe", "gp", "random"):
        algorithm(name, seed=0)
    assert not recwarn.list


def test_optuna_still_has_the_hook_and_the_algorithm_uses_it() -> None:
    assert TPESampler()._parzen_estimator_cls is _ParzenEstimator
    assert algorithm("tpe", seed=0)._parzen_estimator_cls is WideParzenEstimator  # type: ignore[attr-defined]


def test_groups_are_those_that_optuna_finds_in_the_same_order() -> None:
    chance = np.random.default_rng(0)
    study = optuna.create_study()
    for _ in range(40):
        names = chance.choice([f"p{i}" for i in range(8)], chance.integers(0, 7), replace=False)
        ranges: dict[str, Any] = {str(name): FloatDistribution(0, 1) for name in names}
        point = dict.fromkeys(ranges, 0.5)
        study.add_trial(optuna.create_trial(params=point, distributions=ranges, value=1.0))
    theirs = _GroupDecomposedSearchSpace(include_pruned=True).calculate(study).search_spaces
    assert len(theirs) > 1
    assert DistinctGroups(include_pruned=True).calculate(study).search_spaces == theirs


def test_a_proposal_does_not_read_trials_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(sampler=algorithm("tpe", seed=0))
    asked: list[Any] = []
    read = study._storage.get_all_trials

    def get_all_trials(study_id: int, deepcopy: bool = True, states: Any = None) -> Any:
        asked.append(states)
        return read(study_id, deepcopy, states)

    monkeypatch.setattr(study._storage, "get_all_trials", get_all_trials)
    for _ in range(12):
        trial = study.ask()
        asked.clear()
        study.tell(trial, trial.suggest_float("x", 0, 1))
        assert asked
        assert not any(states is None or TrialState.WAITING in states for states in asked)


def test_optuna_builds_our_estimator_when_it_proposes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    widths = WideParzenEstimator._calculate_numerical_distributions

    def count(self: Any, observations: Any, *rest: Any) -> Any:
        asked.append(len(observations))
        return widths(self, observations, *rest)

    monkeypatch.setattr(WideParzenEstimator, "_calculate_numerical_distributions", count)
    study = optuna.create_study(sampler=algorithm("tpe", seed=0))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=10)
    assert not asked, "the first ten are random"
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert sum(asked) == 10, "the ten seen are divided between good and bad"


def test_kernels_have_the_width_that_optuna_4_gave_them() -> None:
    observed = {"x": [0.0, 0.1, 2.0, 2.9], "y": [0.01, 0.02, 0.03, 5.0]}
    scott = 0.2 * 4 ** (-1 / 6)  # four observations in two dimensions
    clipped = max(scott, 1 / 6)  # not below a share 1 / (2 + 4) of the range
    for widths in sigmas(WideParzenEstimator, observed):
        assert widths == pytest.approx([clipped] * 4 + [1.0])


def test_kernels_narrow_slowly_with_the_number_of_observations() -> None:
    columns = np.random.default_rng(0)
    observed = {
        "x": columns.uniform(-1, 3, 60).tolist(),
        "y": columns.uniform(1e-3, 1, 60).tolist(),
    }
    for widths in sigmas(WideParzenEstimator, observed):
        assert widths == pytest.approx([0.2 * 60 ** (-1 / 6)] * 60 + [1.0])
    assert min(sigmas(_ParzenEstimator, observed)[0]) < 0.02, "Optuna 5 follows the neighbours"


def test_estimator_without_observations_is_the_prior() -> None:
    assert sigmas(WideParzenEstimator, {"x": [], "y": []}) == [[1.0], [1.0]]


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_same_seed_gives_the_same_proposals(name: str, bench: dict[str, Any]) -> None:
    def trials(seed: int) -> Any:
        return bench["search"](lambda s: algorithm(name, s), seed, 16)

    assert trials(1) == trials(1)
    assert trials(1) != trials(2)


def test_made_up_problem_has_its_optimum_where_it_says(bench: dict[str, Any]) -> None:
    chosen = {
        "optimizer.sgd.lr": 10**-0.9,
        "optimizer.sgd.weight_decay": 10**-3.5,
        "augment.standard.mixup": 0.3,
        "sampler": "natural",
        "loss": "vector_scaling",
        "loss.vector_scaling.gamma": 0.15,
        "loss.vector_scaling.tau": 1.4,
    }
    recipe = bench["space"]().suggest(optuna.trial.FixedTrial(chosen))
    assert bench["true_value"](recipe) == pytest.approx(bench["OPTIMUM"])


@pytest.mark.long
def test_tpe_finds_more_than_chance(bench: dict[str, Any]) -> None:
    def found(name: str) -> float:
        runs = (bench["search"](lambda s: algorithm(name, s), s, 60) for s in range(4))
        return fmean(max(value for _, value in run) for run in runs)

    assert found("tpe") > found("random")
