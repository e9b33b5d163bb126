"""Shifts, holes and mixtures of whole batches, as functions of tensors and drawn numbers."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def whole(uniform: Tensor, size: Tensor | int) -> Tensor:
    """Whole numbers 0 … size-1 from float32 draws of ``torch.rand`` on the CPU.

    Those are at most 1 - 2^-24, and that times a size below 2^24 never rounds up to the size.
    """
    return (uniform * size).long()


def shift(images: Tensor, down: Tensor, right: Tensor, margin: int) -> Tensor:
    """Move each image by (N,) whole pixels, at most ``margin`` either way; 0 comes in.

    A crop of the padded image at an offset: all crops are a view, so this is one copy.
    """
    height, width = images.shape[-2:]
    crops = F.pad(images, [margin] * 4).unfold(2, height, 1).unfold(3, width, 1)
    each = torch.arange(len(images), device=images.device)
    return taken(crops, each, margin - down, margin - right)


def taken(crops: Tensor, images: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """The crop at (top, left) of each of ``images`` (N,), of all crops (n, c, y, x, H, W).

    On a processor NumPy takes them four to eight times as fast as torch, row by row.
    """
    if crops.device.type != "cpu":
        return crops[images, :, top, left]
    rows, columns = top.numpy(), left.numpy()
    return torch.from_numpy(crops.numpy()[images.numpy(), :, rows, columns])


def mirror(images: Tensor, which: Tensor) -> Tensor:
    """Flip the images for which ``which`` (N,) is true left to right.

    Choosing rows of both versions is five times as fast as ``torch.where`` on the CPU.
    """
    each = torch.arange(len(images), device=images.device)
    return torch.cat([images, images.flip(3)]).index_select(0, each + len(images) * which)


def cut_out(images: Tensor, row: Tensor, column: Tensor, sides: Tensor) -> Tensor:
    """Set a square of ``sides`` (N,) pixels around (row, column) (N,) to 0, clipped."""
    rows = _inside(row, sides, images.shape[-2])
    columns = _inside(column, sides, images.shape[-1])
    return images * ~(rows[:, :, None] & columns[:, None, :])[:, None]


def _inside(center: Tensor, sides: Tensor, size: int) -> Tensor:
    """Which of ``size`` positions lie in the interval of length ``sides`` around ``center``."""
    offset = torch.arange(size, device=center.device) - (center - sides // 2)[:, None]
    return (offset >= 0) & (offset < sides[:, None])


def beta(alpha: float, generator: torch.Generator) -> float:
    """One draw from Beta(α, α); numpy's stays exact for small α, where gammas underflow."""
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def box_share(share: float, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Map (H, W) of 1 outside and 0 inside cutmix's box, whose area is about 1 - ``share``.

    Box as in Yun et al. 2019: the shape of the image, around a random pixel, clipped; the
    share that the targets must have is therefore the mean of the map.
    """
    sides = [round(length * (1 - share) ** 0.5) for length in size]
    centers = torch.rand(2, generator=generator)
    rows, columns = (
        _inside(whole(center, length)[None], torch.tensor([side]), length)[0]
        for center, side, length in zip(centers, sides, size, strict=True)
    )
    return 1 - (rows[:, None] & columns[None, :]).float()


def remix_weight(
    share: Tensor,
    counts: Tensor,
    partner_counts: Tensor,
    *,
    ratio: float = 3.0,
    threshold: float = 0.5,
) -> Tensor:
    """Weight (N,) of the first target when ``share`` (N,) of the pixels are its own.

    1 where the partner's class has at least ``ratio`` times as many samples and its share is
    below ``threshold``, 0 the other way round, else ``share`` (Chou et al. 2020).
    """
    rarer = (partner_counts >= ratio * counts) & (1 - share < threshold)
    commoner = (counts >= ratio * partner_counts) & (share < threshold)
    return torch.where(rarer, 1.0, torch.where(commoner, 0.0, share))
