"""Models small enough for a laptop: linear, multi-layer perceptron, small CNN."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import nn

from tuner.models._base import MODELS
from tuner.models._classifier import Classifier, Head, ImageShape, classifier
from tuner.models._layers import GlobalMean
from tuner.models._weights import load_weights
from tuner.registry import component


@MODELS.register("linear")
@component
class Linear:
    """Logistic regression on the pixels."""

    weights_file: str | None = None

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """Flattened pixels under the head."""
        model = classifier(nn.Flatten(), num_classes, image_shape, head=head, name="linear")
        return load_weights(model, self.weights_file)


@MODELS.register("mlp")
@component
class MLP:
    """Multi-layer perceptron: ``depth`` hidden layers of ``width`` units with ReLU."""

    width: Annotated[int, Field(ge=1)] = 256
    depth: Annotated[int, Field(ge=1)] = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weights_file: str | None = None

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """Hidden layers on the flattened pixels; dropout after each of them."""
        channels, height, width = image_shape
        sizes = [channels * height * width, *[self.width] * self.depth]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            if self.dropout > 0:
                layers.append(nn.Dropout(self.dropout))
        backbone = nn.Sequential(*layers)
        model = classifier(backbone, num_classes, image_shape, head=head, name="mlp")
        return load_weights(model, self.weights_file)


@MODELS.register("small_cnn")
@component
class SmallCNN:
    """Small CNN: stages of 3x3 convolution, batch norm and ReLU, halved in between.

    The first stage has ``width`` channels and each further one twice as many; features are
    the means over the last map. The default has 24 thousand parameters for grey images.
    """

    width: Annotated[int, Field(ge=1)] = 16
    depth: Annotated[int, Field(ge=1)] = 3
    weights_file: str | None = None

    def build(
        self, num_classes: int, image_shape: ImageShape, *, head: Head = "linear"
    ) -> Classifier:
        """Stages and global average pooling; images of at least 2^(depth-1) pixels a side."""
        widths = [image_shape[0], *[self.width << stage for stage in range(self.depth)]]
        layers: list[nn.Module] = []
        for stage, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            layers += _stage(inputs, outputs, halve=stage < self.depth)
        backbone = nn.Sequential(*layers, GlobalMean())
        model = classifier(backbone, num_classes, image_shape, head=head, name="small_cnn")
        return load_weights(model, self.weights_file)


def _stage(inputs: int, outputs: int, *, halve: bool) -> list[nn.Module]:
    """Pooling stands before ReLU: the result is exactly the same, on a quarter of the values."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    pool: list[nn.Module] = [nn.MaxPool2d(2)] if halve else []
    return [convolution, nn.BatchNorm2d(outputs), *pool, nn.ReLU(inplace=True)]
