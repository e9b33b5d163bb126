"""Every image classifier of timm by its name, when timm is installed."""

from __future__ import annotations

import difflib
from typing import Any

from tuner.errors import TunerError, UnknownNameError
from tuner.models._base import MODELS
from tuner.models._classifier import Classifier, Head, ImageShape, classifier, for_images
from tuner.models._weights import load_weights
from tuner.registry import component


@MODELS.register("timm")
@component
class Timm:
    """Any image classifier of timm, by ``architecture``; weights from a local file, if any.

    Needs the extra: ``pip install tuner[timm]``. ``weights_file`` is a .safetensors, .pth
    or .pt file with a state_dict; a head of another number of classes starts afresh.
    """

    architecture: str = "resnet18"
    weights_file: str | None = None

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """The architecture without its last layer, under our head."""
        timm = _timm()
        if not timm.is_model(self.architecture):
            raise UnknownNameError(_unknown(self.architecture, timm.list_models()))
        published = timm.models.get_pretrained_cfg(self.architecture)
        sized = published is not None and published.fixed_input_size
        options = {"img_size": image_shape[1:]} if sized else {}
        with for_images(image_shape, self.architecture):
            backbone = timm.create_model(
                self.architecture, pretrained=False, num_classes=0, **options
            )
        model = classifier(
            backbone, num_classes, image_shape, head=head, name=self.architecture, channels=3
        )
        first, *others = _heads(published)
        return load_weights(model, self.weights_file, file_head=first, unused=others)


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise TunerError('model "timm" needs the package timm: pip install tuner[timm]') from None
    return timm


def _unknown(architecture: str, known: list[str]) -> str:
    close = ", ".join(difflib.get_close_matches(architecture, known, n=5))
    hint = f"; did you mean one of {close}?" if close else "."
    return f"unknown timm architecture {architecture!r}{hint} timm.list_models() lists them all"


def _heads(published: Any) -> tuple[str, ...]:
    """Names of the layers that make the logits in files of this architecture."""
    heads = getattr(published, "classifier", None) or "head"
    return (heads,) if isinstance(heads, str) else tuple(heads)
