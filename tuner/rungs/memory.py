"""What a device says when it has no memory left or broke down, and smaller pieces to train."""

from __future__ import annotations

import torch

from tuner.placing import is_out_of_memory

__all__ = ["free", "is_device_broken", "is_out_of_memory", "smaller"]

SMALLEST = 2


def is_device_broken(error: BaseException) -> bool:
    """Whether an error says that this process cannot use its GPU any more."""
    text = str(error)
    return isinstance(error, RuntimeError) and "CUDA error" in text and "out of memory" not in text


def smaller(micro_batch: int | None, batch_size: int) -> int | None:
    """Half as many images at once; None when they cannot be fewer."""
    half = min(micro_batch or batch_size, batch_size) // 2
    return half if half >= SMALLEST else None


def free(device: str) -> None:
    """Give back what the failed try still holds."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
