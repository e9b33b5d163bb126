"""Makes the twin of a classifier, and checks that it computes what the classifier does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from tuner.models import Classifier, ImageShape
from tuner.seeding import generator
from tuner.twins._layers import LAYERS, by_model

CHECKED = 2
IMAGES = 4
TOLERANCE = 1e-8


class NoTwinError(Exception):
    """A model has no twin; the text says why."""


class Twin(nn.Module):
    """What K classifiers compute, from images (B, K·c, H, W) to logits (K, B, C).

    Parameters and buffers have the classifier's names, and a dimension K before their own.
    """

    def __init__(self, model: Classifier, models: int) -> None:
        super().__init__()
        self.models, self.repeat_channels = models, model.repeat_channels
        self.backbone = _grouped(copy.deepcopy(model.backbone), models)
        self.head = _grouped(copy.deepcopy(model.head), models)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (K, B, C) of normalised images (B, K·c, H, W)."""
        if self.repeat_channels:
            images = images[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2)
        logits: Tensor = self.head(by_model(self.backbone(images), self.models))
        return logits


def twin_of(model: Classifier, models: int) -> Twin:
    """The twin of ``models`` classifiers like this one, all with its weights.

    Raises:
        NoTwinError: A layer has none.
    """
    try:
        return Twin(model, models)
    except ValueError as error:
        raise NoTwinError(str(error)) from error


def _grouped(module: nn.Module, models: int) -> nn.Module:
    """A module whose layers are those of several models.

    Of a module without tensors of its own it is assumed that it treats channels alike, or has a
    number ``models``; ``check`` finds out.
    """
    if type(module) in LAYERS:
        return LAYERS[type(module)](module, models)
    if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        raise NoTwinError(f"{type(module).__name__} has no twin")
    if isinstance(module, _DropoutNd) and module.p > 0:
        raise NoTwinError(f"{type(module).__name__} draws for all models at once")
    if isinstance(getattr(module, "models", None), int):
        module.models = models  # type: ignore[assignment]
    for name, child in list(module.named_children()):
        setattr(module, name, _grouped(child, models))
    return module


def check(model: Classifier, image_shape: ImageShape) -> None:
    """Compare logits, gradients and running statistics of models and their twin, in float64.

    Raises:
        NoTwinError: They differ, or there is no twin.
    """
    models = [_changed(model, number) for number in range(CHECKED)]
    twin = twin_of(models[0], CHECKED)
    _take(twin, models)
    device = next(model.parameters()).device
    images = _noise("images", CHECKED, IMAGES, *image_shape).to(device)
    try:
        found = twin(images.transpose(0, 1).flatten(1, 2))
    except Exception as error:
        raise NoTwinError(f"its twin fails: {error}") from error
    expected = torch.stack([each(own) for each, own in zip(models, images, strict=True)])
    if found.shape != expected.shape or not _near(found, expected):
        raise NoTwinError("its twin's logits differ")
    weight = _noise("weight", *expected.shape).to(device)
    ((found - expected) * weight).sum().backward()
    for name, parameter in twin.named_parameters():
        own = _stacked([each.get_parameter(name).grad for each in models])
        if not _near(parameter.grad, None if own is None else -own):
            raise NoTwinError(f"its twin's gradients differ at {name}")
    for name, buffer in twin.named_buffers():
        if buffer.is_floating_point() and not _near(
            buffer, torch.stack([each.get_buffer(name) for each in models])
        ):
            raise NoTwinError(f"its twin's running statistics differ at {name}")


def _changed(model: Classifier, number: int) -> Classifier:
    """A copy in float64 whose tensors are a little off, each copy's in its own way."""
    changed = copy.deepcopy(model).double()
    tensors: dict[str, Any] = {**dict(changed.named_parameters()), **dict(changed.named_buffers())}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                off = 0.1 * _noise(name, number, *tensor.shape)[-1]
                tensor.mul_(1 + off.clamp(-0.5, 0.5).to(tensor)).add_(0.01)
    return changed


def _noise(name: str, *shape: int) -> Tensor:
    draws = generator("twin", name, *shape)
    rows = max(1, shape[0]), *shape[1:]
    return torch.randn(rows, generator=draws, dtype=torch.float64)


def _take(twin: Twin, models: Sequence[Classifier]) -> None:
    """Give the twin the tensors of the models."""
    for name, parameter in twin.named_parameters():
        parameter.data = torch.stack([each.get_parameter(name).detach() for each in models])
    for name, buffer in twin.named_buffers():
        buffer.copy_(torch.stack([each.get_buffer(name) for each in models]))


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    known = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(known) if known else None


def _near(found: Tensor | None, expected: Tensor | None) -> bool:
    if found is None or expected is None:
        return found is expected
    bound = TOLERANCE * float(expected.detach().abs().max())
    return bool(torch.allclose(found, expected, rtol=TOLERANCE, atol=bound))
