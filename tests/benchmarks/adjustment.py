"""How τ is best chosen on few validation images: freely, or never below min(0, 1 - κ).

Trains every loss on long-tailed digits with several splits, chooses τ on the small validation
part by both rules, and compares balanced and tail accuracy on the large test part.

    python tests/benchmarks/adjustment.py --splits 10
"""

from __future__ import annotations

import argparse
from statistics import mean, stdev
from typing import Any

import torch

from tuner.evaluation import adjusted_logits, tau_grid
from tuner.imbalance import log_priors
from tuner.losses import LOSSES
from tuner.metrics import evaluate
from tuner.posthoc import fit_tau
from tuner.recipe import Recipe
from tuner.trainer import epochs

RULES = ("none", "free", "bounded")
SAMPLERS: tuple[dict[str, Any], ...] = (
    {"name": "natural"},
    {"name": "class_aware", "exponent": 0.5},
)


def recipe(loss: str, sampler: dict[str, Any], split: int) -> Recipe:
    """A digits recipe with its published loss defaults."""
    return Recipe.from_dict(
        {
            "epochs": 20,
            "seed": split,
            "data": {
                "name": "digits",
                "profile": {"name": "exponential", "ratio": 20},
                "tail": {"bottom": 0.5},
                "validation_fraction": 0.5,
                "test_fraction": 0.4,
                "permute": True,
                "seed": split,
            },
            "model": {"name": "mlp"},
            "loss": {"name": loss},
            "sampler": sampler,
            "training": {"batch_size": 32},
        }
    )


def compare(loss: str, sampler: dict[str, Any], split: int) -> dict[str, dict[str, float]]:
    """Test metrics of one training under every rule."""
    chosen = recipe(loss, sampler, split)
    data = chosen.data.build()
    for result in epochs(chosen, data):
        lane, logits = result.lane, result.logits
    priors = log_priors(data.class_counts).float()
    bounded = tau_grid(chosen.correction(data.class_counts, data.groups))
    targets = data.validation.targets
    taus = {
        "none": 0.0,
        "free": fit_tau(logits, targets, priors),
        "bounded": fit_tau(logits, targets, priors, grid=bounded),
    }
    test = lane.logits(data.test.images)
    found = {}
    for rule, tau in taus.items():
        adjusted = adjusted_logits(test, data.class_counts, tau)
        values = evaluate(adjusted, data.test.targets, data.groups)
        found[rule] = {k: values[k] or 0.0 for k in ("balanced_accuracy", "tail_accuracy")}
    return found


def main() -> None:
    """Print mean test accuracy per rule, and the paired difference of the two rules."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=10)
    splits = parser.parse_args().splits
    torch.set_num_threads(1)
    rows = [
        [compare(loss, sampler, split) for loss in LOSSES for sampler in SAMPLERS]
        for split in range(splits)
    ]
    count = len(list(LOSSES)) * len(SAMPLERS)
    print(f"{count} recipes (loss x sampler), {splits} splits, test accuracy in %")
    for metric in ("balanced_accuracy", "tail_accuracy"):
        for rule in RULES:
            per_split = [100 * mean(r[rule][metric] for r in row) for row in rows]
            print(f"{metric:18} {rule:15} {mean(per_split):6.2f}")
        gains = [100 * mean(r[RULES[2]][metric] - r[RULES[1]][metric] for r in row) for row in rows]
        error = stdev(gains) / len(gains) ** 0.5
        print(f"{metric:18} bounded - free  {mean(gains):+6.2f} +- {error:.2f} (over splits)")


if __name__ == "__main__":
    main()
