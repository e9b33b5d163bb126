"""Small models for tests, and the check that one learns."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tuner.models import MODELS, Classifier
from tuner.seeding import seeded

torch.set_num_threads(1)

SMALL = ["linear", "mlp", "small_cnn", "resnet20", "resnet32", "resnet56"]
TINY = {"torchvision": "shufflenet_v2_x0_5", "timm": "test_resnet"}


def component(name: str, **settings: Any) -> Any:
    """A model component; the libraries' default architecture is a tiny one here."""
    if name in TINY:
        settings = {"architecture": TINY[name]} | settings
    return MODELS[name](**settings)


def build(
    name: str,
    shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    head: Literal["linear", "cosine"] = "linear",
    **settings: Any,
) -> Classifier:
    with seeded(0):
        model: Classifier = component(name, **settings).build(classes, shape, head=head)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def check_learns(model: Classifier, shape: tuple[int, int, int], classes: int) -> None:
    """Shapes of features and logits, and a gradient from the loss to the first layer."""
    images = noise(4, *shape)
    features = model.features(images)
    assert features.shape == (4, model.head.weight.shape[1])
    logits = model(images)
    assert logits.shape == (4, classes)
    F.cross_entropy(logits, torch.arange(4) % classes).backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(list(model.parameters()))
    assert model.head.weight.grad is not None
    assert float(model.head.weight.grad.abs().sum()) > 0
    assert float(gradients[0].abs().sum()) > 0
