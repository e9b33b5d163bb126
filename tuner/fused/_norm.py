"""Batch norm with what follows it (an addition, pooling, ReLU) in as few passes as can be.

A pass over maps that no cache holds costs as much as a convolution of few channels: torch takes
some ten for batch norm, pooling and ReLU and their gradients, these functions five.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tuner.fused import _kernels as kernels

Array = NDArray[Any]
MAPS = (torch.bfloat16, torch.float32)


class FusedNorm(nn.Module):
    """A batch norm, then maps that are added, 2x2 max-pooling and ReLU, as far as asked for.

    The batch norm stays the model's own. Up to rounding the results, gradients and running
    statistics are those of the layers one by one, which are used where maps lie otherwise.
    """

    def __init__(
        self, norm: nn.BatchNorm2d, *, pools: bool = False, positive: bool = False
    ) -> None:
        super().__init__()
        self.norm, self.pools, self.positive = norm, pools, positive

    def forward(self, maps: Tensor, added: Tensor | None = None) -> Tensor:
        """Maps of (N, c, H, W), or (N, c, H/2, W/2) where it pools; ``added`` are like the maps."""
        if not self._fits(maps, added):
            return self._after(self.norm(maps), added)
        if not self.pools:
            return self._normed(maps, added, positive=self.positive)
        norm, (height, width) = self.norm, maps.shape[2:]
        whole = self.positive and added is None and height % 2 == width % 2 == 0
        if not whole or not (norm.weight > 0).all():
            return self._after(self._normed(maps, None, positive=False), added)
        self._count()
        if not norm.training:
            return _pooled(maps, *_running(norm), norm.weight, norm.bias)[0]
        pooled: Tensor = _Pooled.apply(  # type: ignore[no-untyped-call]
            maps, norm.weight, norm.bias, norm
        )
        return pooled

    def _normed(self, maps: Tensor, added: Tensor | None, *, positive: bool) -> Tensor:
        norm = self.norm
        self._count()
        if not norm.training:
            return _normed(maps, *_running(norm), norm.weight, norm.bias, added, positive)
        normed: Tensor = _Normed.apply(  # type: ignore[no-untyped-call]
            maps, norm.weight, norm.bias, added, norm, positive
        )
        return normed

    def _after(self, maps: Tensor, added: Tensor | None) -> Tensor:
        """What follows batch norm, layer by layer."""
        maps = F.max_pool2d(maps, 2) if self.pools else maps
        maps = maps if added is None else maps + added
        return F.relu(maps) if self.positive else maps

    def _count(self) -> None:
        if self.norm.training and self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.add_(1)

    def _fits(self, maps: Tensor, added: Tensor | None) -> bool:
        norm = self.norm
        if norm.weight is None or norm.running_mean is None or norm.weight.dtype != torch.float32:
            return False
        if not all(_lies_well(each, maps) for each in (maps, added) if each is not None):
            return False
        if norm.training:
            return norm.momentum is not None and maps.numel() > norm.num_features
        given = [maps, norm.weight, norm.bias, *([] if added is None else [added])]
        return not (torch.is_grad_enabled() and any(each.requires_grad for each in given))


class _Normed(torch.autograd.Function):
    """Batch norm in training, with maps that are added unless None, and ReLU if ``positive``."""

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        weight: Tensor,
        bias: Tensor,
        added: Tensor | None,
        norm: nn.BatchNorm2d,
        positive: bool,
    ) -> Tensor:
        """Maps like ``maps``; the running statistics of ``norm`` move towards the batch's."""
        ctx.found = _statistics(maps, norm)
        mean, inverse = ctx.found
        out = _normed(maps, mean, inverse, weight, bias, added, positive)
        ctx.save_for_backward(maps, weight, out if positive else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of maps, weight, bias and, where they want one, of the added maps."""
        maps, weight, out = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        wanted = gradient if ctx.needs_input_grad[3] else None
        if wanted is not None and out is not None:
            wanted = torch.empty_like(maps)
        sums, into = np.zeros((2, maps.shape[1])), torch.empty_like(maps)
        passed = None if out is None else _rows(out)
        masked = None if wanted is None or out is None else _rows(wanted)
        mean, inverse = ctx.found
        numbers = mean, inverse, weight.detach().numpy()
        kernels.learned(_rows(gradient), passed, _rows(maps), *numbers, masked, sums, _rows(into))
        to_bias, to_weight = torch.from_numpy(sums).float()
        return into, to_weight, to_bias, wanted, None, None


class _Pooled(torch.autograd.Function):
    """Batch norm in training with positive weights, 2x2 max-pooling and ReLU."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d
    ) -> Tensor:
        """Maps (N, c, H/2, W/2); the running statistics of ``norm`` move towards the batch's."""
        ctx.found = _statistics(maps, norm)
        mean, inverse = ctx.found
        out, ctx.where = _pooled(maps, mean, inverse, weight, bias, remember=True)
        ctx.save_for_backward(maps, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of maps, weight and bias."""
        maps, weight, out = ctx.saved_tensors
        given = _pixels(gradient.contiguous(memory_format=torch.channels_last))
        sums, into = np.zeros((2, maps.shape[1])), torch.empty_like(maps)
        mean, inverse = ctx.found
        numbers = mean, inverse, weight.detach().numpy()
        kernels.pooled_learned(
            given, _pixels(out), ctx.where, _squares(maps), *numbers, sums, _squares(into)
        )
        to_bias, to_weight = torch.from_numpy(sums).float()
        return into, to_weight, to_bias, None


def _statistics(maps: Tensor, norm: nn.BatchNorm2d) -> Array:
    """The batch's means and inverse deviations, (2, c); the running ones move towards them."""
    found = np.empty((2, norm.num_features))
    kept: Any = norm.running_mean, norm.running_var
    kernels.statistics(
        _rows(maps), norm.momentum, norm.eps, *(each.numpy() for each in kept), *found
    )
    return found


def _running(norm: nn.BatchNorm2d) -> tuple[Array, Array]:
    """The running means and inverse deviations, (c,)."""
    mean: Any = norm.running_mean
    variance: Any = norm.running_var
    return mean.double().numpy(), (variance.double() + norm.eps).rsqrt().numpy()


def _normed(
    maps: Tensor,
    mean: Array,
    inverse: Array,
    weight: Tensor,
    bias: Tensor,
    added: Tensor | None,
    positive: bool,
) -> Tensor:
    out = torch.empty_like(maps)
    numbers = mean, inverse, weight.detach().numpy(), bias.detach().numpy()
    more = None if added is None else _rows(added)
    kernels.normed(_rows(maps), *numbers, more, positive, _rows(out))
    return out


def _pooled(
    maps: Tensor,
    mean: Array,
    inverse: Array,
    weight: Tensor,
    bias: Tensor,
    *,
    remember: bool = False,
) -> tuple[Tensor, Array | None]:
    """The maps, and which pixels they are of where a gradient asks for them later."""
    images, channels, height, width = maps.shape
    size = (images, channels, height // 2, width // 2)
    out = torch.empty(size, dtype=maps.dtype, memory_format=torch.channels_last)
    where = np.empty(_pixels(out).shape, np.uint8) if remember else None
    numbers = mean, inverse, weight.detach().numpy(), bias.detach().numpy()
    kernels.pooled(_squares(maps), *numbers, _pixels(out), where)
    return out, where


def _lies_well(maps: Tensor, like: Tensor) -> bool:
    """Whether the kernels can take maps, which lie pixel by pixel with all channels together."""
    alike = maps.shape == like.shape and maps.dtype == like.dtype and maps.dtype in MAPS
    on_processor = maps.device.type == "cpu" and maps.dim() == 4
    return alike and on_processor and maps.permute(0, 2, 3, 1).is_contiguous()


def _pixels(maps: Tensor) -> Array:
    """Maps (N, c, H, W) as an array (N, H, W, c); bfloat16 as its bits."""
    pixels = maps.detach().permute(0, 2, 3, 1)
    found: Array = (pixels.view(torch.uint16) if maps.dtype == torch.bfloat16 else pixels).numpy()
    return found


def _rows(maps: Tensor) -> Array:
    """Maps as an array of their rows, (N * H, W * c)."""
    images, channels, height, width = maps.shape
    return _pixels(maps).reshape(images * height, width * channels)


def _squares(maps: Tensor) -> Array:
    """Maps as an array of squares of 2x2 pixels, (N, H/2, 2, W/2, 2, c)."""
    images, channels, height, width = maps.shape
    return _pixels(maps).reshape(images, height // 2, 2, width // 2, 2, channels)
