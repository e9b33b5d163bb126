"""Does a recipe come to the same accuracy in Tuner as in the ordinary loop of ``trainer.py``?

One recipe per model (learning rate, exponent of the sampler) is trained with several seeds by the
loop as tutorials write it, and by Tuner in both precisions, with fused norms. Printed is the
balanced accuracy on the validation part, mean and standard error over the seeds, and Tuner's less
the loop's.

    python tests/benchmarks/equal.py --data FOLDER --seeds 10    # train/ and val/; about 20 minutes
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import tomli_w
import torch
from optuna.trial import FixedTrial
from trainer import MODELS, study
from trainer_contenders import OrdinaryLoop

from tuner.datasets import Data
from tuner.metrics import balanced_accuracy, confusion_matrix
from tuner.recipe import Recipe
from tuner.study import StudyFile, parse
from tuner.trainer import epochs
from tuner.training import Precision

LR, EXPONENT = 0.045, 0.5


def by_tuner(file: StudyFile, data: Data, precision: Precision, seed: int) -> float:
    """Train the recipe; its balanced accuracy on the validation part."""
    found = {"optimizer.sgd.lr": LR, "sampler.class_aware.exponent": EXPONENT}
    recipe: Recipe = file.space.suggest(FixedTrial(found))
    training = replace(recipe.training, precision=precision, layout="fused")
    recipe = replace(recipe, data=file.data, seed=seed, training=training)
    *_, last = epochs(recipe, data)
    guesses = last.lane.logits(data.validation.images).argmax(1)
    return balanced_accuracy(confusion_matrix(guesses, data.validation.targets, data.num_classes))


def by_loop(loop: OrdinaryLoop, seed: int) -> float:
    """The same by the ordinary loop."""
    return loop.objective(FixedTrial({"lr": LR, "exponent": EXPONENT}, number=seed))


def compare(model: str, options: argparse.Namespace) -> None:
    """Print a model's row."""
    values = study(model, 0, options)
    file = parse(values, tomli_w.dumps(values), where=model)
    data = file.data.build()
    trains: dict[str, Callable[[int], float]] = {
        "ordinary": partial(by_loop, OrdinaryLoop(file, data)),
        "float32": partial(by_tuner, file, data, "float32"),
        "bfloat16": partial(by_tuner, file, data, "bfloat16"),
    }
    found = {
        name: [100 * train(seed) for seed in range(options.seeds)]
        for name, train in trains.items()
        if name in options.sides
    }
    cells = [f"{fmean(each):.2f} ± {_error(each):.2f}" for each in found.values()]
    for name in found.keys() - {"ordinary"} if "ordinary" in found else ():
        own, loop = found[name], found["ordinary"]
        error = (_error(own) ** 2 + _error(loop) ** 2) ** 0.5
        cells.append(f"{name}: {fmean(own) - fmean(loop):+.2f} ± {error:.2f}")
    print(f"| {model} | {' | '.join(cells)} |", flush=True)


def _error(values: list[float]) -> float:
    return float(stdev(values) / len(values) ** 0.5)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sides", nargs="*", default=["ordinary", "float32", "bfloat16"])
    parser.add_argument("--ratio", type=float, default=100.0)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--size", type=int)
    parser.add_argument("--channels", type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{date.today()}: balanced accuracy, {options.seeds} seeds")
    for model in options.models:
        compare(model, options)


if __name__ == "__main__":
    main()
