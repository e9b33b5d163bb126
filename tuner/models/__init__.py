"""Models by name: a backbone and a head for any number of classes and size of images."""

from tuner.models._base import MODELS, Model
from tuner.models._classifier import (
    Classifier,
    CosineHead,
    Head,
    ImageShape,
    LinearHead,
    classifier,
    head_state,
    set_head_bias,
)
from tuner.models._resnet import ResNet20, ResNet32, ResNet56
from tuner.models._small import MLP, Linear, SmallCNN
from tuner.models._timm import Timm
from tuner.models._torchvision import TorchVision

__all__ = [
    "MLP",
    "MODELS",
    "Classifier",
    "CosineHead",
    "Head",
    "ImageShape",
    "Linear",
    "LinearHead",
    "Model",
    "ResNet20",
    "ResNet32",
    "ResNet56",
    "SmallCNN",
    "Timm",
    "TorchVision",
    "classifier",
    "head_state",
    "set_head_bias",
]
