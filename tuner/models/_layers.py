"""Layers whose gradients keep the layout of the maps, as the ordinary ones do not.

A gradient in another layout than its map makes every elementwise kernel before it take the slow
path: measured on one core, 30 times as long for a ReLU, a sixth of a training step in all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GlobalMean(nn.Module):
    """Mean over the pixels of each map, (N, c, H, W) → (N, c)."""

    def forward(self, maps: Tensor) -> Tensor:
        """The means; pixel by pixel with all channels, as channels_last lies in memory."""
        return maps.permute(0, 2, 3, 1).flatten(1, 2).mean(1)


def subsampled(maps: Tensor, stride: int) -> Tensor:
    """Every ``stride``-th row and column, (N, c, H, W) → (N, c, ⌈H/stride⌉, ⌈W/stride⌉).

    Pooling of single pixels: the same values as slicing.
    """
    return F.avg_pool2d(maps, 1, stride)


def with_channels(maps: Tensor, before: int, after: int, models: int) -> Tensor:
    """Maps with so many channels of zeros before and after those of each of ``models`` models.

    The channels of several models stand one model after the other, (N, models·c, H, W).
    """
    if models == 1:
        return F.pad(maps, [0, 0, 0, 0, before, after])
    if maps.is_contiguous(memory_format=torch.channels_last):
        pixels = maps.permute(0, 2, 3, 1)
        apart = pixels.view(*pixels.shape[:3], models, -1)
        return F.pad(apart, [before, after]).flatten(3).permute(0, 3, 1, 2)
    apart = maps.view(len(maps), models, -1, *maps.shape[2:])
    return F.pad(apart, [0, 0, 0, 0, before, after]).flatten(1, 2)
