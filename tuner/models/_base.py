"""The registry of models and what every model component offers."""

from __future__ import annotations

from typing import Protocol

from tuner.models._classifier import Classifier, Head, ImageShape
from tuner.registry import Registry


class Model(Protocol):
    """Hyperparameters of an architecture, and the file that its weights come from, if any."""

    @property
    def weights_file(self) -> str | None:
        """A .safetensors, .pth or .pt file with a state_dict; None for weights that are drawn.

        It is the ``model.safetensors`` of an export, or what the library publishes that the
        architecture is from. A relative path is looked for where Tuner runs.
        """

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """Classifier for normalised images (N, *image_shape), with the weights of the file.

        Others are drawn from torch's global generator; wrap the call in ``seeding.seeded``. That
        draws the same with a file as without.

        Raises:
            TunerError: The architecture is unknown or cannot take images of this shape, or the
                file is missing or holds other weights.
        """


MODELS: Registry[Model] = Registry("model")
