"""A classifier is a backbone that makes features and a head that scores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.errors import TunerError

Head = Literal["linear", "cosine"]
ImageShape = tuple[int, int, int]

LinearHead = nn.Linear


class CosineHead(nn.Module):
    """Cosine between features and class vectors, (N, D) → (N, C) in [-1, 1]; no bias.

    The normalised linear layer of LDAM (Cao et al. 2019), whose loss brings the scale.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh class vectors of length 1."""
        nn.init.uniform_(self.weight, -1, 1)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, C) of ``features`` (N, D)."""
        return F.linear(F.normalize(features), F.normalize(self.weight))

    def extra_repr(self) -> str:
        """The sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Classifier(nn.Module):
    """Logits (N, C) = ``head`` of the features that ``backbone`` makes of images.

    With ``repeat_channels`` a grey image is given to the backbone as three equal channels.
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Linear | CosineHead, *, repeat_channels: bool = False
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.repeat_channels = repeat_channels

    def features(
        self, images: Tensor, backbone: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """Features (N, D) of normalised float ``images`` (N, channels, H, W).

        ``backbone`` computes what the classifier's own would, in its place.
        """
        if self.repeat_channels:
            images = images.expand(-1, 3, -1, -1)
        features: Tensor = (backbone or self.backbone)(images)
        return features.flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of normalised float ``images`` (N, channels, H, W)."""
        logits: Tensor = self.head(self.features(images))
        return logits


def classifier(
    backbone: nn.Module,
    num_classes: int,
    image_shape: ImageShape,
    *,
    head: Head,
    name: str,
    channels: int | None = None,
) -> Classifier:
    """Put a head on a freshly built ``backbone``; ``channels`` is all it takes, if fixed.

    Raises:
        TunerError: The backbone called ``name`` cannot take images of this shape.
    """
    repeat = channels == 3 and image_shape[0] == 1
    shape = (3, *image_shape[1:]) if repeat else image_shape
    width = _feature_width(backbone, shape, name)
    top = CosineHead(width, num_classes) if head == "cosine" else LinearHead(width, num_classes)
    return Classifier(backbone, top, repeat_channels=repeat)


def head_state(head: nn.Module) -> tuple[Tensor, Tensor]:
    """L2 norms of a head's rows and its bias (zeros when it has none), both (C,) on the CPU.

    A cosine head divides by the norms itself: they are 1.
    """
    if isinstance(head, CosineHead):
        ones = torch.ones(head.out_features)
        return ones, torch.zeros_like(ones)
    weight: Tensor = head.weight.detach().float().cpu()  # type: ignore[operator]
    bias: Tensor | None = getattr(head, "bias", None)
    norms = weight.norm(dim=1)
    return norms, torch.zeros_like(norms) if bias is None else bias.detach().float().cpu()


@torch.no_grad()
def _feature_width(backbone: nn.Module, image_shape: ImageShape, name: str) -> int:
    """Number of features D, from one blank image in evaluation mode (which draws nothing)."""
    device = next((p.device for p in backbone.parameters()), None)
    backbone.eval()
    with for_images(image_shape, name):
        features: Tensor = backbone(torch.zeros(1, *image_shape, device=device))
    backbone.train()
    return features.flatten(1).shape[1]


@contextmanager
def for_images(image_shape: ImageShape, name: str) -> Iterator[None]:
    """Say which model cannot take images of which shape when something in the block fails.

    Raises:
        TunerError: Anything was raised inside; libraries have no error of their own for it.
    """
    try:
        yield
    except Exception as error:
        channels, height, width = image_shape
        why = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise TunerError(
            f"model {name!r} cannot take images of {height}x{width} pixels with {channels} "
            f"channel(s): {why}. Choose another model, or load the images in another size"
        ) from error


def set_head_bias(model: Classifier, value: float) -> None:
    """Set every class bias to ``value``, so that a sigmoid head starts at a chosen prior.

    With value -log(C - 1) each class starts at probability 1/C (Cui et al. 2019).

    Raises:
        ValueError: The head has no bias.
    """
    bias = getattr(model.head, "bias", None)
    if bias is None:
        raise ValueError(f"{type(model.head).__name__} has no bias to set")
    nn.init.constant_(bias, value)
