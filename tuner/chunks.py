"""How many images a model sees at a time: one chunk's activations are in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

CACHED_PIXELS = 2**18
"""Of larger batches the maps leave a processor's cache.

ResNet-20 takes 1.7 times as long for 512 images of 32x32 as for 256, and 2.2 times for 256 of 64x64
as for 64.
"""
FEWEST = 8
EVALUATION_BATCH = 512
LOADED_PIXELS = 2**22
"""Of larger evaluation batches those loaded ahead would fill the memory that processes share."""


def cached_batch(height: int, width: int) -> int:
    """Images of this size whose maps fit a processor's cache when nothing is learned from them."""
    return max(FEWEST, CACHED_PIXELS // (height * width))


def evaluation_batch(height: int, width: int, device: torch.device) -> int:
    """Images of this size that are judged at a time; a processor's cache holds few maps."""
    fitting = LOADED_PIXELS // (height * width)
    if device.type == "cpu":
        fitting = cached_batch(height, width)
    return max(1, min(EVALUATION_BATCH, fitting))


def number_of_chunks(size: int, micro_batch: int | None) -> int:
    """Chunks of at most ``micro_batch`` images that ``size`` images are split into.

    Never so many that one is left with a single image, on which batch norm cannot train:
    three images are one chunk also where ``micro_batch`` is 2.
    """
    if micro_batch is None:
        return 1
    return max(1, min(-(-size // micro_batch), size // 2))


def logits_in_chunks(
    forward: Callable[[Tensor], Tensor], inputs: Tensor, chunks: int, model: nn.Module
) -> Tensor:
    """Logits (B, C) of ``inputs`` (B, ...) through ``forward``, which calls ``model``.

    Chunks differ in size by at most one. A chunk's activations are dropped after its forward
    pass and made again, with the same random draws, when gradients reach it. So the loss is
    that of the whole batch, whatever it does with it, and so is the gradient; the price is a
    second forward pass. Batch norm normalises chunk by chunk, and counts each chunk once.
    """
    parts = [
        recomputed(
            forward,
            chunk,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _running_statistics_kept(model)),
        )
        for chunk in inputs.tensor_split(chunks)
    ]
    return torch.cat(parts)


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Keep norms in training mode from counting a chunk for the second time."""
    norms: list[Any] = [
        module
        for module in model.modules()
        if module.training and getattr(module, "track_running_stats", False)
    ]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches
