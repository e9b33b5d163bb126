"""How classifiers are trained on cached features; the same for every recipe of a study."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from tuner.registry import component

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@component
class HeadTraining:
    """Training of the classifier alone: SGD with momentum, the rate falling by half a cosine.

    ``epochs``: passes over the features, each of as many samples as the training part has.
    ``lr``: for features whose mean squared length is 1; features are scaled to it, so that one
    rate suits every backbone. ``copies``: augmented copies of the training images whose
    features are cached. ``batches``: "shared" trains all recipes on the same batches, with
    the sampler as weights of the samples; "own" draws each recipe's batches by its sampler,
    which is slower and noisier. Samplers and losses that look at single samples or at the
    composition of a batch have batches of their own in any case.
    """

    epochs: Annotated[int, Field(ge=1)] = 10
    batch_size: Annotated[int, Field(ge=2)] = 256
    lr: Annotated[float, Field(gt=0)] = 10.0
    copies: Annotated[int, Field(ge=1)] = 2
    batches: Literal["shared", "own"] = "shared"

    def rate(self, progress: float) -> float:
        """Learning rate at ``progress`` in [0, 1]: half a cosine, down to 0."""
        return self.lr * (1 + math.cos(math.pi * progress)) / 2
