"""Recipes over the digits for tests of the trainer, and what a training of one gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tuner.datasets import Data
from tuner.recipe import Recipe
from tuner.trainer import EpochResult, epochs

DIGITS = {
    "name": "digits",
    "profile": {"name": "exponential", "ratio": 10},
    "validation_fraction": 0.4,
    "test_fraction": 0.3,
}

VARIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw": {"optimizer": {"name": "adamw"}},
    "deferred sampler and weights": {
        "sampler": {"name": "class_aware", "exponent": 1.0, "start": 0.5},
        "loss": {"name": "weighted_cross_entropy", "power": 1.0, "start": 0.5},
    },
    "fnr-adaptive with mixup": {
        "loss": {"name": "fnr_adaptive"},
        "augment": {"name": "standard", "flip": False, "crop_padding": 1, "mixup": 0.4},
    },
    "curriculum": {"sampler": {"name": "curriculum"}},
    "two stages, classifier only": {
        "training": {
            "name": "two_stage",
            "switch": 0.5,
            "classifier_only": True,
            "reset_head": True,
            "batch_size": 64,
        }
    },
    "deferred with running rates": {
        "training": {"name": "deferred", "switch": 0.5, "batch_size": 64},
        "loss": {"name": "fnr_adaptive"},
        "sampler": {"name": "class_aware", "exponent": 1.0},
    },
    "batch norm and cosine head": {
        "model": {"name": "small_cnn"},
        "loss": {"name": "ldam", "start": 0.5},
    },
    "fused norms": {
        "model": {"name": "small_cnn"},
        "training": {"batch_size": 64, "layout": "fused"},
    },
    "equalization": {"loss": {"name": "equalization", "threshold": 0.1}},
    "dropout": {"model": {"name": "mlp", "dropout": 0.3}},
}


def recipe(*, length: int = 4, **parts: Any) -> Recipe:
    """A multi-layer perceptron on the digits, but for ``parts``."""
    values: dict[str, Any] = {
        "epochs": length,
        "seed": 7,
        "data": DIGITS,
        "model": {"name": "mlp"},
        "training": {"batch_size": 64},
        **parts,
    }
    return Recipe.from_dict(values)


@dataclass(frozen=True)
class Trained:
    """Validation logits and training loss of every epoch, and the final weights."""

    logits: list[Tensor]
    losses: list[float]
    weights: dict[str, Tensor]

    def ends_as(self, results: list[EpochResult]) -> bool:
        """Whether these last epochs are bit for bit those of the whole training."""
        last = slice(len(self.logits) - len(results), None)
        weights = results[-1].lane.model.state_dict()
        return (
            [result.train_loss for result in results] == self.losses[last]
            and all(
                torch.equal(result.logits, logits)
                for result, logits in zip(results, self.logits[last], strict=True)
            )
            and all(torch.equal(weights[name], self.weights[name]) for name in self.weights)
        )

    def ends_near(self, results: list[EpochResult], tolerance: float) -> None:
        """Assert that these last epochs are those of the whole training, but for rounding."""
        last = slice(len(self.logits) - len(results), None)
        near: dict[str, Any] = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close([r.train_loss for r in results], self.losses[last], **near)
        torch.testing.assert_close([r.logits for r in results], self.logits[last], **near)
        weights = results[-1].lane.model.state_dict()
        torch.testing.assert_close(dict(weights), self.weights, **near)


def trained(which: Recipe, data: Data, **options: Any) -> Trained:
    """Train from start to end."""
    results = list(epochs(which, data, **options))
    weights = dict(results[-1].lane.model.state_dict())
    return Trained([r.logits for r in results], [r.train_loss for r in results], weights)
