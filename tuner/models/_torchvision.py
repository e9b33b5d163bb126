"""Every classifier of torchvision by its name."""

from __future__ import annotations

from typing import Any

from torch import nn

from tuner.errors import UnknownNameError, unknown_name
from tuner.models._base import MODELS
from tuner.models._classifier import Classifier, Head, ImageShape, classifier, for_images
from tuner.models._weights import load_weights
from tuner.registry import component

AUXILIARY_HEADS = ("aux1", "aux2", "AuxLogits")


@MODELS.register("torchvision")
@component
class TorchVision:
    """Any classifier of torchvision, by ``architecture``; weights from a local file, if any.

    ``weights_file`` is a .safetensors, .pth or .pt file with a state_dict, such as the ones
    torchvision publishes; a head of another number of classes starts afresh.
    """

    architecture: str = "resnet18"
    weights_file: str | None = None

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """The architecture with its last layer replaced by our head."""
        from torchvision.models import get_model

        _check_name(self.architecture)
        with for_images(image_shape, self.architecture):
            options = _options(self.architecture, image_shape)
            backbone = get_model(self.architecture, weights=None, **options)
        file_head = last_layer(backbone)
        backbone.set_submodule(file_head, nn.Identity())
        model = classifier(
            backbone, num_classes, image_shape, head=head, name=self.architecture, channels=3
        )
        return load_weights(model, self.weights_file, file_head=file_head, unused=AUXILIARY_HEADS)


def last_layer(network: nn.Module) -> str:
    """Dotted name of the last linear layer or convolution: the one that makes the logits."""
    modules: dict[str, nn.Module] = dict(network.named_modules())
    return [n for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


def _check_name(architecture: str) -> None:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise UnknownNameError(unknown_name("torchvision architecture", architecture, known))


def _options(architecture: str, image_shape: ImageShape) -> dict[str, Any]:
    """What some constructors must be told: no auxiliary heads, and the size of the images."""
    if architecture in ("googlenet", "inception_v3"):
        return {"aux_logits": False, "init_weights": True}
    if architecture.startswith("vit_"):
        return {"image_size": image_shape[1]}
    if architecture.startswith("maxvit"):
        return {"input_size": image_shape[1:]}
    return {}
