"""Layers of K models at once (the horizontal fusion of Wang et al. 2021, HFTA).

Maps of the models stand side by side as channels, (B, K·c, H, W); so do features, (B, K·f), until
the first product, which makes them (K, B, f). Each model's numbers come of its own alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tuner.models import CosineHead


class GroupedConv2d(nn.Module):
    """K convolutions as one with K times as many groups; weights (K, *those of one)."""

    bias: Tensor | None

    def __init__(self, layer: nn.Conv2d, models: int) -> None:
        super().__init__()
        if layer.padding_mode != "zeros":
            raise ValueError(f"a convolution pads with {layer.padding_mode}")
        self.weight = _stacked(layer.weight, models)
        self.register_parameter("bias", _stacked(layer.bias, models))
        self.options: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups * models,
        }

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, K·c, H, W) → (B, K·c', H', W')."""
        bias = None if self.bias is None else self.bias.flatten()
        return F.conv2d(maps, self.weight.flatten(0, 1), bias, **self.options)


class GroupedBatchNorm2d(nn.Module):
    """K batch norms: as channels know nothing of each other, one over all of them."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, layer: nn.BatchNorm2d, models: int) -> None:
        super().__init__()
        if not layer.affine or not layer.track_running_stats or layer.momentum is None:
            raise ValueError("a batch norm without scales, running statistics or momentum")
        self.weight, self.bias = _stacked(layer.weight, models), _stacked(layer.bias, models)
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer.expand(models, *buffer.shape).clone())
        self.momentum, self.eps = layer.momentum, layer.eps
        self.train(layer.training)

    def forward(self, maps: Tensor) -> Tensor:
        """Normalised maps; running statistics move in place, batches are not counted."""
        mean, variance = self.running_mean.view(-1), self.running_var.view(-1)
        scale, shift = self.weight.flatten(), self.bias.flatten()
        options = (self.training, self.momentum, self.eps)
        return F.batch_norm(maps, mean, variance, scale, shift, *options)


class GroupedLinear(nn.Module):
    """K linear layers as one batched product."""

    bias: Tensor | None

    def __init__(self, layer: nn.Linear, models: int) -> None:
        super().__init__()
        self.weight = _stacked(layer.weight, models)
        self.register_parameter("bias", _stacked(layer.bias, models))

    def forward(self, features: Tensor) -> Tensor:
        """Features of K models → (K, B, f')."""
        own, columns = by_model(features, len(self.weight)), self.weight.transpose(1, 2)
        if self.bias is None:
            return torch.bmm(own, columns)
        return torch.baddbmm(self.bias[:, None], own, columns)


class GroupedCosineHead(nn.Module):
    """K cosine heads as one batched product."""

    def __init__(self, layer: CosineHead, models: int) -> None:
        super().__init__()
        self.weight = _stacked(layer.weight, models)

    def forward(self, features: Tensor) -> Tensor:
        """Features of K models → cosines (K, B, C)."""
        own = F.normalize(by_model(features, len(self.weight)), dim=2)
        return torch.bmm(own, F.normalize(self.weight, dim=2).transpose(1, 2))


def by_model(features: Tensor, models: int) -> Tensor:
    """Features (K, B, f) from those side by side, (B, K·f) or (B, K·c, H, W), or as they are."""
    if features.ndim == 3:
        return features
    flat = features.flatten(1)
    return flat.view(len(flat), models, -1).transpose(0, 1)


def _stacked(parameter: Tensor | None, models: int) -> Any:
    """A parameter (K, *shape), K times the given one."""
    if parameter is None:
        return None
    copies = parameter.detach().expand(models, *parameter.shape).clone()
    return nn.Parameter(copies, requires_grad=parameter.requires_grad)


LAYERS: Mapping[type[nn.Module], Callable[[Any, int], nn.Module]] = {
    nn.Conv2d: GroupedConv2d,
    nn.BatchNorm2d: GroupedBatchNorm2d,
    nn.Linear: GroupedLinear,
    CosineHead: GroupedCosineHead,
}
