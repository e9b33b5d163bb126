"""The registry of models and what every model component offers."""

from __future__ import annotations

from typing import Protocol

from tuner.models._classifier import Classifier, Head, ImageShape
from tuner.registry import Registry


class Model(Protocol):
    """Hyperparameters of an architecture, without its weights."""

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """Freshly initialised classifier for normalised images (N, *image_shape).

        Weights are drawn from torch's global generator; wrap the call in ``seeding.seeded``.

        Raises:
            TunerError: The architecture is unknown or cannot take images of this shape.
        """


MODELS: Registry[Model] = Registry("model")
