"""The registry of models and what every model component offers."""

from __future__ import annotations

import contextlib
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


class _Models(Registry[Model]):
    """Models by name, which knows the names that other libraries have for theirs."""

    def unknown(self, name: str) -> str:
        """Say that no model is called ``name``, and how to ask a library for it that has it."""
        for library, has in (("torchvision", _torchvision_has), ("timm", _timm_has)):
            with contextlib.suppress(ImportError):
                if has(name):
                    return (
                        f"unknown model {name!r}; {library} has it: "
                        f'name = "{library}", architecture = "{name}"'
                    )
        return super().unknown(name)


def _torchvision_has(name: str) -> bool:
    import torchvision

    return name in torchvision.models.list_models(module=torchvision.models)


def _timm_has(name: str) -> bool:
    import timm

    return bool(timm.is_model(name))


MODELS: Registry[Model] = _Models("model")
