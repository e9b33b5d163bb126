"""How classifiers are trained on cached features; the same for every recipe of a study."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from tuner.registry import component

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
COSINE_PACE = 4.0
"""A cosine head's rate is so much of the common one, over the square of the loss's scale.

The curvature of the loss grows with that square; at the common rate the class vectors outgrow
all further steps at once, and need hundreds to recover.
"""
COHORT = 128
"""Recipes that the head rung trains at once, unless memory lacks."""


@component
class HeadTraining:
    """Training of the classifier alone: SGD with momentum, the rate falling by half a cosine.

    ``epochs``: passes over the features, each of as many samples as the training part has;
    more where that would be fewer than ``steps`` steps.
    ``lr``: of features that are centred and have a mean squared length of 1, so that one rate
    suits every backbone. ``copies``: copies of the training images whose features are cached;
    the first is plain, the others are augmented. ``batches``: "shared" trains all recipes on
    the same batches, with the sampler as weights of the samples; "own" draws each recipe's
    batches by its sampler, which is three times as slow and ranks recipes no better. Samplers
    that look at single images and losses without a closed form have their own in any case.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    steps: Annotated[int, Field(ge=0)] = 400
    batch_size: Annotated[int, Field(ge=2)] = 256
    lr: Annotated[float, Field(gt=0)] = 10.0
    copies: Annotated[int, Field(ge=1)] = 2
    batches: Literal["shared", "own"] = "shared"

    def for_images(self, images: int) -> HeadTraining:
        """These settings with as many epochs as ``images`` training images need."""
        per_epoch = -(-images // self.batch_size)
        return replace(self, epochs=max(self.epochs, -(-self.steps // per_epoch)))

    def rate(self, progress: float) -> float:
        """Learning rate at ``progress`` in [0, 1]: half a cosine, down to 0."""
        return self.lr * (1 + math.cos(math.pi * progress)) / 2
