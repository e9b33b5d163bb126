"""Which search algorithm finds good recipes soonest, on a made-up long-tail problem.

Nothing is trained: a formula stands in for the tail accuracy of a recipe, with the structure
that real ones have. Losses bring hyperparameters of their own, the best learning rate follows
the loss and its hyperparameters, sampler and loss share one correction, and every observation
is noisy. ``python tests/benchmarks/algorithms.py`` prints the table of ``RESULTS.md``.
"""

from __future__ import annotations

import argparse
import math
import random
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from tuner.recipe import Recipe
from tuner.search import algorithm
from tuner.space import Space
from tuner.study import parse

STUDY = """
name = "made-up"
data = { name = "digits" }
model = { name = "linear" }
budget = { trials = 1000, epochs = 1 }

[space.optimizer.sgd]
lr = { low = 1e-4, high = 1.0, log = true }
weight_decay = { low = 1e-6, high = 1e-1, log = true }

[space.augment.standard]
mixup = { low = 0.0, high = 1.0 }

[space.sampler.natural]
[space.sampler.class_aware]
exponent = { low = 0.0, high = 1.0 }

[space.loss.cross_entropy]
[space.loss.weighted_cross_entropy]
power = { low = 0.0, high = 1.0 }
[space.loss.asymmetric]
gamma_pos = { low = 0.0, high = 4.0 }
gamma_neg = { low = 0.0, high = 8.0 }
eps = { low = 0.0, high = 0.3 }
[space.loss.ldam]
max_margin = { low = 0.1, high = 1.0 }
scale = { low = 10.0, high = 50.0 }
start = { low = 0.0, high = 0.95 }
[space.loss.vector_scaling]
gamma = { low = 0.0, high = 0.5 }
tau = { low = 0.0, high = 3.0 }
"""

NOISE = 0.01
OPTIMUM = 0.55
CEILINGS = {
    "CrossEntropy": 0.42,
    "WeightedCrossEntropy": 0.47,
    "Asymmetric": 0.53,
    "Ldam": 0.54,
    "VectorScaling": OPTIMUM,
}
"""Best value with each loss, by the name of its component."""

Make = Callable[[int], BaseSampler]


def _tpe(seed: int, **settings: Any) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=seed, **settings)


ALGORITHMS: dict[str, Make] = {
    "random": lambda seed: RandomSampler(seed=seed),
    "TPE, Optuna 5 as it comes": _tpe,
    "TPE, every hyperparameter alone": lambda seed: _tpe(seed, multivariate=False),
    "TPE, groups, bandwidth of Optuna 5": lambda seed: _tpe(seed, multivariate=True, group=True),
    "tpe of Tuner: groups, bandwidth of Optuna 4": lambda seed: algorithm("tpe", seed),
}


def space() -> Space:
    """The made-up search space, read as a study file is."""
    return parse(tomllib.loads(STUDY), STUDY, where="made-up").space


def true_value(recipe: Recipe) -> float:
    """The made-up tail accuracy of a recipe, without noise; at most ``OPTIMUM``."""
    optimizer, exponent = recipe.optimizer, getattr(recipe.sampler, "exponent", 0.0)
    own, correction, rate = _loss_terms(recipe.loss)
    off_rate = math.log10(optimizer.lr) - rate
    decay = math.log10(optimizer.weight_decay) + 3.5 + 0.3 * off_rate
    mixup = recipe.augment.mixup - (0.7 if exponent > 0 else 0.3)
    kappa = correction + exponent - 1.4
    shared = 0.06 * off_rate**2 + 0.015 * decay**2 + 0.04 * mixup**2 + 0.05 * kappa**2
    return CEILINGS[type(recipe.loss).__name__] - own - float(shared)


def _loss_terms(loss: Any) -> tuple[float, float, float]:
    """Penalty for the loss's own hyperparameters, its correction, log10 of its best rate."""
    match type(loss).__name__:
        case "WeightedCrossEntropy":
            return 0.0, loss.power, -1.2
        case "Asymmetric":
            focus, smoothing = (loss.gamma_pos - 1) / 1.5, (loss.eps - 0.05) / 0.1
            own = 0.05 * focus**2 + 0.05 * smoothing**2
            return own, 0.4, -2.4 + 0.25 * (loss.gamma_neg - 4)
        case "Ldam":
            margin, start = (loss.max_margin - 0.5) ** 2, (loss.start - 0.8) ** 2
            return 0.6 * margin + 0.5 * start, 0.4, -1 - (loss.scale - 30) / 30
        case "VectorScaling":
            own = 0.05 * ((loss.gamma - 0.15) / 0.15) ** 2
            return own, loss.tau, -0.9 - 0.8 * (loss.tau - 1.4)
        case _:
            return 0.0, 0.0, -1.0


def search(make: Make, seed: int, trials: int) -> list[tuple[str, float]]:
    """Loss and true value of each trial; the algorithm is told noisy values."""
    searched, noise = space(), random.Random(seed)
    study = optuna.create_study(direction="maximize", sampler=make(seed))
    seen = []
    for _ in range(trials):
        trial = study.ask()
        recipe = searched.suggest(trial)
        value = true_value(recipe)
        study.tell(trial, value + noise.gauss(0, NOISE))
        seen.append((type(recipe.loss).__name__, value))
    return seen


def is_stuck(losses: Sequence[str]) -> bool:
    """Whether nine tenths of the later half of the trials have one loss that is not the best."""
    later = losses[len(losses) // 2 :]
    loss, times = Counter(later).most_common(1)[0]
    return CEILINGS[loss] < OPTIMUM and times >= 0.9 * len(later)


def table(seeds: int, after: Sequence[int]) -> str:
    """A Markdown table: mean ± standard error of the best true value after so many trials.

    ``regret`` is what is missing to the optimum at the end, as a share of random search's;
    ``stuck`` the share of searches that end with a loss that is not the best.
    """
    lines = [
        "| algorithm | " + " | ".join(f"after {n}" for n in after) + " | regret | stuck |",
        "|---" * (len(after) + 3) + "|",
    ]
    at_random = math.nan
    for name, make in ALGORITHMS.items():
        runs = [search(make, seed, max(after)) for seed in range(seeds)]
        columns = [[max(value for _, value in run[:n]) for run in runs] for n in after]
        missing = OPTIMUM - fmean(columns[-1])
        at_random = missing if name == "random" else at_random
        cells = [f"{fmean(c):.4f} ± {stdev(c) / math.sqrt(seeds):.4f}" for c in columns]
        stuck = fmean(is_stuck([loss for loss, _ in run]) for run in runs)
        cells += [f"{missing / at_random:.2f}", f"{stuck:.0%}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=30, help="searches per algorithm, at least 2")
    parser.add_argument("--after", type=int, nargs="+", default=[30, 60, 120], metavar="TRIALS")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(table(options.seeds, options.after))


if __name__ == "__main__":
    main()
