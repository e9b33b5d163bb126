"""The residual networks for 32x32 images of He et al. 2016, section 4.2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tuner.models._base import MODELS
from tuner.models._classifier import Classifier, Head, ImageShape, classifier
from tuner.models._layers import GlobalMean, subsampled, with_channels
from tuner.models._weights import load_weights
from tuner.registry import component

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A of the paper).

    Where the block has a stride, the shortcut takes every second pixel and fills the new
    channels with zeros, half of them on either side. ``models`` is the number of models whose
    channels stand side by side: see ``tuner.twins``.
    """

    models = 1

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(self, images: Tensor) -> Tensor:
        """Maps (N, outputs, H / stride, W / stride) of ``images`` (N, inputs, H, W)."""
        residual = F.relu(self.bn1(self.conv1(images)), inplace=True)
        residual = self.bn2(self.conv2(residual))
        # In place, as none of these maps is needed again: a twentieth less time on a processor.
        residual += self._shortcut(images)
        return F.relu(residual, inplace=True)

    def _shortcut(self, images: Tensor) -> Tensor:
        if self.stride == 1:
            return images
        before = self.new_channels // 2
        after = self.new_channels - before
        return with_channels(subsampled(images, self.stride), before, after, self.models)


def _backbone(channels: int, blocks: int) -> nn.Module:
    """Stem, three stages of ``blocks`` blocks, and the mean over the map: 64 features."""
    stem = nn.Conv2d(channels, WIDTHS[0], 3, 1, 1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(WIDTHS[0]), nn.ReLU(inplace=True)]
    inputs = WIDTHS[0]
    for outputs in WIDTHS:
        for _ in range(blocks):
            layers.append(Block(inputs, outputs, stride=1 if inputs == outputs else 2))
            inputs = outputs
    return nn.Sequential(*layers, GlobalMean())


def _initialize(module: nn.Module) -> None:
    """Normal weights with variance 2 / fan-in, as in the reference code of LDAM-DRW."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)


def _build(
    name: str, blocks: int, num_classes: int, image_shape: ImageShape, head: Head
) -> Classifier:
    backbone = _backbone(image_shape[0], blocks)
    model = classifier(backbone, num_classes, image_shape, head=head, name=name)
    return model.apply(_initialize)


@MODELS.register("resnet20")
@component
class ResNet20:
    """ResNet-20 for 32x32 images (He et al. 2016, section 4.2), 0.27 million parameters."""

    weights_file: str | None = None

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """Three blocks a stage."""
        model = _build("resnet20", 3, num_classes, image_shape, head)
        return load_weights(model, self.weights_file)


@MODELS.register("resnet32")
@component
class ResNet32:
    """ResNet-32 for 32x32 images (He et al. 2016, section 4.2), 0.46 million parameters."""

    weights_file: str | None = None

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """Five blocks a stage; the usual model for long-tailed CIFAR."""
        model = _build("resnet32", 5, num_classes, image_shape, head)
        return load_weights(model, self.weights_file)


@MODELS.register("resnet56")
@component
class ResNet56:
    """ResNet-56 for 32x32 images (He et al. 2016, section 4.2), 0.85 million parameters."""

    weights_file: str | None = None

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """Nine blocks a stage."""
        model = _build("resnet56", 9, num_classes, image_shape, head)
        return load_weights(model, self.weights_file)
