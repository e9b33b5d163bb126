"""What dropping recipes on the way costs the confirm rung, and whether it makes means too high.

Searches are simulated: true values of 40 recipes are normal, every training adds noise of its
seed and of its validation images. The best of the search are confirmed as ``ConfirmRung`` says,
and the answer is the best mean over the fresh seeds and the search. Printed are the regret (true
value of the best recipe less that of the answer), by how much the reported mean of the fresh
seeds is too high for the answer, and the trainings, plain cross-entropy's not counted.

    python tests/benchmarks/confirm_rule.py    # a minute
"""

from __future__ import annotations

import argparse
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from tuner.ladder import ConfirmRung

Array = NDArray[np.float64]
TRIALS, SEED_NOISE = 40, 1.2
WORLDS = ((4.0, 4.0), (4.0, 6.0), (2.0, 4.0), (2.0, 1.0), (0.0, 4.0))
"""Standard deviations in points: of true values, and of what validation images add."""
RULES = (
    ConfirmRung(recipes=5, keep=1.0),
    ConfirmRung(recipes=5),
    ConfirmRung(recipes=6),
    ConfirmRung(recipes=7),
    ConfirmRung(recipes=8),
    ConfirmRung(recipes=10),
    ConfirmRung(recipes=10, keep=1.0),
)


def confirm(rule: ConfirmRung, true: Array, noise: Array) -> tuple[float, float, int]:
    """Regret, optimism and trainings of one search.

    ``true`` (T,) are the recipes' values, ``noise`` (T, 1 + seeds) that of the search and of the
    fresh seeds.
    """
    values = true[:, None] + noise
    going = np.argsort(-values[:, 0])[: rule.recipes]
    trainings = 0
    for seeds in range(1, rule.seeds + 1):
        trainings += len(going)
        going = going[np.argsort(-values[going, : seeds + 1].mean(1))]
        if seeds < rule.seeds:
            going = going[: rule.going_on(len(going))]
    answer = going[0]
    fresh = values[answer, 1 : rule.seeds + 1].mean()
    return float(true.max() - true[answer]), float(fresh - true[answer]), trainings


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--searches", type=int, default=20_000)
    options = parser.parse_args()
    print("| spread, noise of images | recipes, keep | regret | mean too high by | trainings |")
    print("|---|---|---|---|---|")
    for spread, images in WORLDS:
        for rule in RULES:
            draws = np.random.default_rng(0)
            sd = float(np.hypot(SEED_NOISE, images))
            found = [
                confirm(
                    rule,
                    draws.normal(0, spread, TRIALS),
                    draws.normal(0, sd, (TRIALS, 1 + rule.seeds)),
                )
                for _ in range(options.searches)
            ]
            regret, optimism, trainings = map(fmean, zip(*found, strict=True))
            print(
                f"| {spread:g}, {images:g} | {rule.recipes}, {rule.keep:g} | {regret:.2f} | "
                f"{optimism:.2f} | {trainings:.0f} |"
            )


if __name__ == "__main__":
    main()
